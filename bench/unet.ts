/**
 * Forwards of the full-size UNets: time, share of the adapter's peak and of its roofline, what each family of kernels takes,
 * and what encoding costs on the CPU.
 */
import { existsSync } from 'node:fs';
import { cpus } from 'node:os';
import { Engine } from '../src/engine/engine.ts';
import { tunedChoices } from '../src/engine/tuning.ts';
import type { Batch } from '../src/engine/types.ts';
import { Device } from '../src/gpu/device.ts';
import type { Capabilities, Storage } from '../src/gpu/kernel.ts';
import type { Timing } from '../src/gpu/plan.ts';
import { baseDispatches, drafted, familyOf, leastBytes } from './draft.ts';
import { type Encoding, encodingOf, submitting } from './encoding.ts';
import { factsOf, writeResult } from './facts.ts';
import { CONFIGS, FULL_MODELS, type FullModel, modelFile, shapeOf, stepOf } from './full-size.ts';
import { driverCpuMs, type Measured, median, quantile } from './measure.ts';
import { type Ratio, ratioOf } from './pairs.ts';
import { peakOf, peaksOf, rateOf } from './peak.ts';

export interface UNetBenchOptions {
  readonly model: FullModel;
  readonly sizes: readonly number[];
  readonly batches: readonly number[];
  readonly storage: Storage;
  readonly rounds: number;
  /** File of choices that `unetd tune` measured; by rules alone where left out. */
  readonly tuning?: string | undefined;
  readonly json?: string | undefined;
  readonly adapter?: string | undefined;
}

/** Profiled forwards, of which each dispatch counts by its median. */
const PROFILES = 3;

interface Family {
  readonly name: string;
  readonly dispatches: number;
  readonly ms: number;
  readonly flops: number;
  /** Operands of every dispatch counted once. */
  readonly bytes: number;
  /** Least time by the measured peaks, the larger of arithmetic and memory for each dispatch. */
  readonly rooflineMs: number;
}

interface Row {
  readonly model: FullModel;
  readonly size: number;
  readonly batch: number;
  readonly storage: Storage;
  /** From tensors in memory to the result in memory. */
  readonly wallMs: number;
  readonly gpuMs: number;
  readonly spreadMs: number;
  /** Processor time of a software driver's threads over all cores: what an idle machine would take. */
  readonly coreMs: number | undefined;
  /** The time of the first batch measured, which ran in turns with this one, goes into this one's so many times. */
  readonly overFirst: Ratio;
  readonly coreOverFirst: Ratio | undefined;
  readonly flops: number;
  readonly dispatches: number;
  /** A dispatch. */
  readonly encoding: Encoding;
  readonly submitMs: number;
  readonly rooflineMs: number;
  readonly families: readonly Family[];
}

/** Peaks in FLOP and bytes per millisecond. */
interface Rates {
  readonly flops: number;
  readonly bytes: number;
}

interface Peaks extends Rates {
  readonly capabilities: Capabilities;
}

export interface UNetResult {
  readonly loadMs: number;
  readonly rates: Rates;
  readonly rows: readonly Row[];
}

/** By processor time on a software adapter, as the forwards are. */
async function measurePeaks(device: Device, { storage, tuning }: UNetBenchOptions): Promise<Peaks> {
  const peaks = await peaksOf(device);
  const [flops, bytes] = [peakOf(peaks, 'flops', storage), peaks.bytes];
  const msOf = ({ ms, coreMs }: Measured): number => coreMs ?? ms;
  // As the engine plans.
  const capabilities = { ...device.capabilities, tuned: tunedChoices(device.adapter, tuning ?? false) };
  return { capabilities, flops: flops.flops / msOf(flops), bytes: bytes.bytes / msOf(bytes) };
}

/**
 * The dispatches of profiled forwards by kernel, with what the plan says of them. `ms` is what the whole forward takes: each
 * dispatch gets its share, since a pass of its own costs each some microseconds, and others may use the machine meanwhile.
 */
function familiesOf(
  profiles: readonly (readonly Timing[])[],
  ms: number,
  { model, storage }: UNetBenchOptions,
  shape: ReturnType<typeof shapeOf>,
  peaks: Peaks,
): readonly Family[] {
  const dispatches = baseDispatches(drafted(CONFIGS[model], shape, storage, peaks.capabilities));
  const [timings] = profiles as readonly [readonly Timing[]];
  if (dispatches.length !== timings.length)
    throw new Error(
      `the engine ran ${timings.length} dispatches, the plan drafted here has ${dispatches.length}`,
    );
  const medians = timings.map((_, i) => median(profiles.map((profile) => profile[i]!.ms)));
  const scale = ms / medians.reduce((sum, took) => sum + took, 0);
  const families = new Map<string, Family>();
  for (const [i, dispatch] of dispatches.entries()) {
    const { label } = timings[i]!;
    if (label !== dispatch.label)
      throw new Error(`dispatch ${i} is "${label}", the plan drafted here has "${dispatch.label}"`);
    const name = familyOf(dispatch);
    const bytes = leastBytes(dispatch);
    const before = families.get(name) ?? { name, dispatches: 0, ms: 0, flops: 0, bytes: 0, rooflineMs: 0 };
    families.set(name, {
      name,
      dispatches: before.dispatches + 1,
      ms: before.ms + medians[i]! * scale,
      flops: before.flops + dispatch.flops,
      bytes: before.bytes + bytes,
      rooflineMs: before.rooflineMs + Math.max(dispatch.flops / peaks.flops, bytes / peaks.bytes),
    });
  }
  return [...families.values()].sort((a, b) => b.ms - a.ms);
}

/** One forward; `core` is NaN where it cannot be told. */
interface Run {
  readonly wall: number;
  readonly gpu: number;
  readonly core: number;
  readonly submit: number;
}

async function runOf(engine: Engine, batch: Batch): Promise<Run> {
  const before = driverCpuMs() ?? Number.NaN;
  const begun = performance.now();
  const [submit, { gpuMs }] = await submitting(() => engine.forward(batch));
  const wall = performance.now() - begun;
  const core = ((driverCpuMs() ?? Number.NaN) - before) / cpus().length;
  return { wall, gpu: gpuMs, core, submit };
}

/** Forwards of one size, batch by batch in turns, since a machine that others use is not as fast at all times. */
async function measureSize(
  engine: Engine,
  device: Device,
  options: UNetBenchOptions,
  size: number,
  peaks: Peaks,
): Promise<readonly Row[]> {
  const { model, batches, storage, rounds } = options;
  const { capabilities } = peaks;
  const requests = batches.map((images) => ({ model, requests: [stepOf(images, size, model)] }));
  // The first compiles and binds.
  for (const request of requests) await engine.forward(request);
  const runs = requests.map((): Run[] => []);
  for (let round = 0; round < rounds; round++)
    for (const [i, request] of requests.entries()) runs[i]!.push(await runOf(engine, request));
  const rows: Row[] = [];
  for (const [i, batch] of batches.entries()) {
    const own = runs[i]!;
    const of = (what: keyof Run): readonly number[] => own.map((run) => run[what]);
    const over = (what: 'gpu' | 'core'): Ratio =>
      ratioOf(own.map((run, round) => run[what] / runs[0]![round]![what]));
    const gpuMs = median(of('gpu'));
    const isTold = capabilities.software && !of('core').some(Number.isNaN);
    const coreMs = isTold ? median(of('core')) : undefined;
    const profiles: (readonly Timing[])[] = [];
    for (let round = 0; round < PROFILES; round++) profiles.push(await engine.profile(requests[i]!));
    const families = familiesOf(profiles, coreMs ?? gpuMs, options, shapeOf(batch, size), peaks);
    const sum = (what: 'dispatches' | 'flops' | 'rooflineMs'): number =>
      families.reduce((total, family) => total + family[what], 0);
    const sorted = [...of('gpu')].sort((a, b) => a - b);
    rows.push({
      ...{ model, size, batch, storage, gpuMs, coreMs, families },
      wallMs: median(of('wall')),
      spreadMs: quantile(sorted, 0.75) - quantile(sorted, 0.25),
      overFirst: over('gpu'),
      coreOverFirst: isTold ? over('core') : undefined,
      flops: sum('flops'),
      dispatches: sum('dispatches'),
      encoding: await encodingOf(device, CONFIGS[model], shapeOf(batch, size), storage, capabilities),
      submitMs: median(of('submit')),
      rooflineMs: sum('rooflineMs'),
    });
  }
  return rows;
}

const times = ({ median, low, high }: Ratio): string =>
  `${median.toFixed(2)} (${low.toFixed(2)} to ${high.toFixed(2)})`;
const percent = (share: number): string => `${(share * 100).toFixed(0)} %`;

function show(row: Row, peaks: Peaks): void {
  const { model, size, batch, wallMs, gpuMs, spreadMs, coreMs, flops, families } = row;
  const speed = (ms: number): string =>
    `${rateOf('flops', { flops, bytes: 0 }, ms).toFixed(1)} GFLOP/s, ${percent(flops / ms / peaks.flops)} of the peak, ` +
    `${percent(row.rooflineMs / ms)} of the roofline`;
  console.log(`\n${FULL_MODELS[model]}, latents ${size}x${size}, batch ${batch}, ${row.storage}`);
  console.log(
    `  ${wallMs.toFixed(0)} ms, on the GPU ${gpuMs.toFixed(0)} ± ${spreadMs.toFixed(0)} ms: ` +
      `${(flops / 1e9).toFixed(0)} GFLOP at ${speed(gpuMs)}`,
  );
  const { overFirst, coreOverFirst } = row;
  console.log(
    `  ${times(overFirst)} of the first batch's time` +
      `${coreOverFirst ? `, ${times(coreOverFirst)} of its processor time` : ''}`,
  );
  if (coreMs !== undefined) console.log(`  by processor time ${coreMs.toFixed(0)} ms: ${speed(coreMs)}`);
  console.log(
    `  ${row.dispatches} dispatches, encoded in ${row.encoding.us.toFixed(1)} us each (calls of the bindings ` +
      `${row.encoding.callsUs.toFixed(1)}), submitted in ${row.submitMs.toFixed(1)} ms`,
  );
  const total = families.reduce((sum, { ms }) => sum + ms, 0);
  for (const { name, dispatches, ms: took, flops: work, bytes, rooflineMs } of families)
    console.log(
      `  ${name.padEnd(14)}${String(dispatches).padStart(5)}${took.toFixed(1).padStart(10)} ms ${percent(took / total).padStart(5)}` +
        `${(work / took / 1e6).toFixed(1).padStart(9)} GFLOP/s${(bytes / took / 1e6).toFixed(1).padStart(7)} GB/s` +
        `${percent(rooflineMs / took).padStart(8)} of the roofline`,
    );
}

export async function benchUNet(options: UNetBenchOptions): Promise<void> {
  const { model, sizes, storage, tuning = false, adapter } = options;
  // An engine goes on without such a file; figures that are called tuned must not.
  if (tuning && !existsSync(tuning)) throw new Error(`${tuning} is not there: nothing was tuned`);
  const device = await Device.open({ adapter });
  const facts = factsOf(device.adapter);
  const peaks = await measurePeaks(device, options);
  const rates = { flops: peaks.flops, bytes: peaks.bytes };
  const engine = await Engine.create({ tuning, ...(adapter ? { adapter } : {}) });
  const rows: Row[] = [];
  try {
    const file = modelFile(model);
    const begun = performance.now();
    await engine.loadModel(file, storage);
    const loadMs = performance.now() - begun;
    console.log(`${file.path} loaded in ${(loadMs / 1000).toFixed(1)} s`);
    for (const size of sizes) {
      const measured = await measureSize(engine, device, options, size, peaks);
      for (const row of measured) show(row, peaks);
      rows.push(...measured);
      // What has been measured stays, however long the rest takes.
      writeResult(options.json, 'unet', facts, { loadMs, rates, rows } satisfies UNetResult);
    }
  } finally {
    await engine.close();
    device.close();
  }
}
