/** Times a case on a device: warm-up, then timestamps of several runs. Knows neither shapes nor output formats. */
import { readdirSync, readFileSync } from 'node:fs';
import { cpus } from 'node:os';
import type { Device } from '../src/gpu/device.ts';
import type { Storage } from '../src/gpu/kernel.ts';
import type { Built, Case } from '../test/kernels/case.ts';
import { closePrepared, type Prepared, prepare } from '../test/kernels/run.ts';

export interface Measured {
  /** Median over the runs, and the distance between their quartiles, of all dispatches together. */
  readonly ms: number;
  readonly spreadMs: number;
  /**
   * On a software driver: processor time of its threads, spread over all cores. What an idle machine would take; the
   * median's own time counts whatever else ran meanwhile.
   */
  readonly coreMs: number | undefined;
  readonly runs: number;
  readonly flops: number;
  readonly bytes: number;
  readonly variant: string;
}

/** Processor time of all threads but the first, which is JavaScript's; undefined where /proc has no such file. */
export function driverCpuMs(): number | undefined {
  try {
    const tasks = readdirSync('/proc/self/task').filter((task) => Number(task) !== process.pid);
    const ns = tasks.map((task) =>
      Number(readFileSync(`/proc/self/task/${task}/schedstat`, 'utf8').split(' ')[0]),
    );
    return ns.reduce((a, b) => a + b, 0) / 1e6;
  } catch {
    return undefined;
  }
}

/** Clock ticks of /proc/PID/stat in a second. */
const TICKS = 100;

/** Processor time of a process and its children, in steps of 10 ms; undefined where there is no /proc. */
export function treeCpuMs(pid: number): number | undefined {
  try {
    const children = readdirSync(`/proc/${pid}/task`).flatMap((task) =>
      readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').split(' ').filter(Boolean),
    );
    // The command's name, in brackets, may hold anything: fields are counted behind it.
    const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').replace(/.*\) /, '').split(' ');
    const own = ((Number(fields[11]) + Number(fields[12])) * 1000) / TICKS;
    return children.reduce((sum, child) => sum + (treeCpuMs(Number(child)) ?? 0), own);
  } catch {
    return undefined;
  }
}

/** Linear between neighbours; `sorted` ascends. */
export const quantile = (sorted: readonly number[], q: number): number => {
  const at = (sorted.length - 1) * q;
  const low = sorted[Math.floor(at)] ?? 0;
  return low + ((sorted[Math.ceil(at)] ?? 0) - low) * (at % 1);
};

export const median = (values: readonly number[]): number =>
  quantile(
    [...values].sort((a, b) => a - b),
    0.5,
  );

/** What is measured: a case in a storage, by a variant or the one that the rules pick. */
export interface Work {
  readonly one: Case;
  readonly storage: Storage;
  readonly variant?: string | undefined;
}

/** Runs at least 5 times and for about `budgetMs`. */
export async function measure(device: Device, work: Work, budgetMs: number): Promise<Measured> {
  const [measured] = await measureInTurns(device, [work], budgetMs);
  return measured!;
}

/** The same of several, one run of each after the other; the budget is the first one's. */
export async function measureInTurns(
  device: Device,
  works: readonly Work[],
  budgetMs: number,
): Promise<Measured[]> {
  const turns: Turn[] = [];
  try {
    for (const { one, storage, variant } of works) {
      const built = one.build(storage);
      turns.push({ built, variant, prepared: await prepare(device, built, storage, variant), runs: [] });
    }
    let spentMs = 0;
    // The first run compiles, the second warms caches.
    for (let run = -2; run < 5 || (run < 50 && spentMs < budgetMs); run++)
      for (const { prepared, runs } of turns) {
        const timed = await timeOnce(prepared);
        if (run >= 0) runs.push(timed);
        if (run >= 0 && runs === turns[0]?.runs) spentMs += timed.ms;
      }
    device.check();
    return turns.map((turn) => measuredOf(turn, device.capabilities.software));
  } finally {
    for (const { prepared } of turns) closePrepared(prepared);
  }
}

interface Run {
  readonly ms: number;
  readonly coreMs: number | undefined;
  readonly flops: number;
}

interface Turn {
  readonly built: Built;
  readonly variant: string | undefined;
  readonly prepared: Prepared;
  readonly runs: Run[];
}

async function timeOnce({ plan }: Prepared): Promise<Run> {
  const before = driverCpuMs();
  const timings = await plan.profile();
  const after = driverCpuMs();
  return {
    ms: timings.reduce((sum, { ms }) => sum + ms, 0),
    coreMs: before === undefined || after === undefined ? undefined : (after - before) / cpus().length,
    flops: timings.reduce((sum, { flops }) => sum + flops, 0),
  };
}

function measuredOf({ built, variant, runs }: Turn, software: boolean): Measured {
  const times = runs.map(({ ms }) => ms).sort((a, b) => a - b);
  const cores = runs.flatMap(({ coreMs }) => coreMs ?? []);
  return {
    ms: quantile(times, 0.5),
    spreadMs: quantile(times, 0.75) - quantile(times, 0.25),
    coreMs: software && cores.length > 0 ? median(cores) : undefined,
    runs: times.length,
    flops: runs[0]?.flops ?? 0,
    bytes: built.bytes,
    variant: variant ?? 'picked',
  };
}
