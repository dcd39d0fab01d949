/**
 * How much an endurance test does, and what it reads about the processes it tires: their memory and open files, from /proc.
 * `ENDURANCE=long` is for the runs of their own (`npm run test:fuzz`, `test:soak`, `test:kill`, `test:pool`). No test itself.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { loadavg } from 'node:os';

export const IS_LONG: boolean = process.env.ENDURANCE === 'long';

/** One of two amounts: of a run of its own, and of the normal suite. */
export function amount(long: number, short: number): number {
  return IS_LONG ? long : short;
}

export const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** A generator of numbers from 0 to 1 that a seed repeats (mulberry32). */
export type Random = () => number;

export function randomFrom(seed: number): Random {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** That of the variable SEED, or a new one; printed, so that a failure can be repeated. */
export function seedOf(what: string): number {
  const seed = Number(process.env.SEED ?? Math.floor(Math.random() * 2 ** 31));
  report(`${what}: seed ${seed}, load ${loadavg()[0]!.toFixed(1)}`);
  return seed;
}

/** Writes a line of figures past the test runner. */
export function report(line: string): void {
  process.stderr.write(`  ${line}\n`);
}

export function below(random: Random, limit: number): number {
  return Math.floor(random() * limit);
}

export function pick<Value>(random: Random, values: readonly Value[]): Value {
  return values[below(random, values.length)]!;
}

export interface Vitals {
  readonly rssBytes: number;
  readonly files: number;
}

/** Of one process, as it is now. */
export function vitalsOf(pid: number): Vitals {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  const kib = Number(/^VmRSS:\s+(\d+)/m.exec(status)?.[1]);
  return { rssBytes: kib * 1024, files: readdirSync(`/proc/${pid}/fd`).length };
}

/** The engine process of a server; undefined while there is none. */
export function enginePid(serverPid: number): number | undefined {
  const children = readFileSync(`/proc/${serverPid}/task/${serverPid}/children`, 'utf8').trim().split(' ');
  return children
    .map(Number)
    .find((pid) => pid > 0 && readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('engine/child.'));
}

export function mib(bytes: number): string {
  return `${(bytes / 1024 ** 2).toFixed(1)} MiB`;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
}
