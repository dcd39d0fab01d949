/**
 * What an adapter is and does, without any model: its facts, the rates of its matrix units by shape, what a dispatch costs, and
 * which way weights had best take to the matrix units.
 */
import { create } from 'webgpu';
import { DAWN_FEATURES, Device } from '../src/gpu/device.ts';
import type { Capabilities } from '../src/gpu/kernel.ts';
import { elapsedMs, STOPWATCH_BYTES, Stopwatch } from '../src/gpu/stopwatch.ts';
import type { Case } from '../test/kernels/case.ts';
import { difference } from '../test/kernels/compare.ts';
import { closePrepared, prepare, runCase } from '../test/kernels/run.ts';
import { baseDispatches, drafted } from './draft.ts';
import { factsOf, writeResult } from './facts.ts';
import { CONFIGS, shapeOf } from './full-size.ts';
import { matrixBCase, matrixPeak } from './matrix-peak.ts';
import { measure, median } from './measure.ts';
import { matrixPeakOf, matrixVariantsOf, peaksOf, rateOf, stream } from './peak.ts';

export interface ProbeOptions {
  /** Matrices of a size that a software driver multiplies in seconds. */
  readonly quick?: boolean | undefined;
  readonly json?: string | undefined;
  readonly adapter?: string | undefined;
}

export interface ProbeResult {
  readonly info: Readonly<Record<string, unknown>>;
  readonly features: readonly string[];
  readonly limits: Readonly<Record<string, number>>;
  readonly capabilities: Capabilities;
  /** Dispatches of a step of SD 1.5 at 512x512 in f16, by the variants that the rules choose. */
  readonly variants: Readonly<Record<string, number>>;
  readonly rates: readonly Rate[];
  /** Of a tiny dispatch that reads what the one before it wrote, in one pass. */
  readonly dispatchUs: number | undefined;
}

export interface Rate {
  readonly name: string;
  readonly rate: number;
  readonly unit: 'GFLOP/s' | 'GB/s';
  readonly ms: number;
}

/** The attributes of an object of the bindings, which are getters of its prototype. */
function attributesOf<T>(object: object): Readonly<Record<string, T>> {
  const entries: [string, T][] = [];
  for (const name in object) {
    const value = (object as Readonly<Record<string, unknown>>)[name];
    if (typeof value !== 'function') entries.push([name, value as T]);
  }
  return Object.fromEntries(entries);
}

/** Dispatches of one workgroup in a row. */
const ROW = 1000;
const ROUNDS = 15;

/** Two buffers that are copied to and fro: no dispatch can begin before the last one has ended. */
const rowCase: Case = {
  name: `${ROW} dispatches in a row`,
  kernel: stream,
  build: () => ({
    inputs: { x: { as: 'f32', values: new Float32Array(1024) } },
    outputs: { out: { as: 'f32', count: 1024 } },
    bytes: 0,
    dispatches: ({ x, out }) =>
      Array.from({ length: ROW }, (_, i) => ({
        ...{ kernel: stream, variant: 'plain', choices: {}, constants: {}, params: { quads: 256 } },
        operands: i % 2 === 0 ? { x: x!, out: out! } : { x: out!, out: x! },
        grid: [1, 1, 1] as const,
        label: 'copy',
        flops: 0,
      })),
  }),
};

async function dispatchUs(device: Device): Promise<number | undefined> {
  const stopwatch = Stopwatch.of(device);
  if (!stopwatch) return undefined;
  const prepared = await prepare(device, rowCase.build('f32'), 'f32', undefined);
  const times: number[] = [];
  for (let round = -2; round < ROUNDS; round++) {
    const encoder = device.gpu.createCommandEncoder();
    prepared.plan.encode(encoder, {}, stopwatch.writes);
    device.gpu.queue.submit([encoder.finish()]);
    const stopped = device.gpu.createCommandEncoder();
    stopwatch.stop(stopped, prepared.arena.buffer, 0);
    device.gpu.queue.submit([stopped.finish()]);
    const ms = elapsedMs(await device.read(prepared.arena.buffer, 0, STOPWATCH_BYTES));
    if (round >= 0) times.push(ms);
  }
  closePrepared(prepared);
  stopwatch.close();
  device.check();
  return (median(times) * 1000) / ROW;
}

/** Depths of SD 1.5's linear layers and of its deepest convolutions. */
const DEPTHS = [1280, 11_520] as const;

/** Weights directly from their buffer and by way of workgroup memory, checked at a small size and timed at a real one. */
async function weightPaths(device: Device, isQuick: boolean): Promise<readonly Rate[]> {
  const rates: Rate[] = [];
  for (const variant of matrixVariantsOf(device.capabilities))
    for (const isStaged of [false, true]) {
      const small = matrixBCase(variant, isStaged, [128, 96, 128]).build('f16');
      const { expected, tolerance } = small.outputs.out!;
      const { outputs } = await runCase(device, small, 'f16', undefined);
      const wrong = difference('out', outputs.out!, expected!(), tolerance!);
      if (wrong) throw new Error(`${variant}, weights ${isStaged ? 'staged' : 'direct'}: ${wrong}`);
      for (const depth of DEPTHS) {
        const one = matrixBCase(variant, isStaged, isQuick ? [64, 64, 64] : [4096, depth, 1280]);
        const measured = await measure(device, { one, storage: 'f16' }, 300);
        rates.push(
          rateRow(`weights ${one.name}`, 'GFLOP/s', measured.ms, rateOf('flops', measured, measured.ms)),
        );
      }
    }
  return rates;
}

const rateRow = (name: string, unit: Rate['unit'], ms: number, rate: number): Rate => ({
  name,
  rate,
  unit,
  ms,
});

export async function benchProbe({ quick = false, json, adapter }: ProbeOptions): Promise<void> {
  const device = await Device.open({ adapter });
  const facts = factsOf(device.adapter);
  const { capabilities, gpu } = device;
  // Dawn tells the matrix configurations by the adapter, not by the device.
  const instance = create([DAWN_FEATURES, ...(adapter ? [`adapter=${adapter}`] : [])]);
  const info = attributesOf<unknown>((await instance.requestAdapter())!.info);
  console.log(`features: ${device.adapter.features.join(', ')}`);
  console.log(`adapter: ${JSON.stringify(info)}`);
  const variants: Record<string, number> = {};
  for (const { kernel, variant } of baseDispatches(
    drafted(CONFIGS.sd15, shapeOf(2, 64), 'f16', capabilities),
  )) {
    const name = `${kernel.name} ${variant}`;
    variants[name] = (variants[name] ?? 0) + 1;
  }
  console.log(`dispatches of an SD 1.5 step: ${JSON.stringify(variants)}`);
  const result = { info, features: device.adapter.features, limits: attributesOf<number>(gpu.limits) };
  const peaks = await peaksOf(device);
  const rates = [
    rateRow('f32 multiply-add', 'GFLOP/s', peaks.flops.ms, rateOf('flops', peaks.flops, peaks.flops.ms)),
    rateRow('copy', 'GB/s', peaks.bytes.ms, rateOf('bytes', peaks.bytes, peaks.bytes.ms)),
  ];
  for (const variant of matrixVariantsOf(capabilities)) {
    const measured = await matrixPeakOf(device, variant);
    const { m, n, k, input } = matrixPeak.variants[variant]!.matrix!;
    const name = `matrix units ${input} ${m}x${n}x${k}`;
    rates.push(rateRow(name, 'GFLOP/s', measured.ms, rateOf('flops', measured, measured.ms)));
  }
  const note = (dispatch?: number): void =>
    writeResult(json, 'probe', facts, {
      ...{ ...result, capabilities, variants, rates, dispatchUs: dispatch },
    } satisfies ProbeResult);
  note();
  const each = await dispatchUs(device);
  console.log(`a dispatch in a row of ${ROW}: ${each?.toFixed(2) ?? 'no timestamps'} us`);
  note(each);
  rates.push(...(await weightPaths(device, quick)));
  for (const { name, rate, unit } of rates)
    console.log(`${name.padEnd(44)} ${rate.toFixed(1).padStart(10)} ${unit}`);
  note(each);
  device.close();
  // Collected before, it would take the process down.
  void instance;
}
