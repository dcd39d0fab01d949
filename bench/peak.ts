/**
 * What an adapter can do at most: its f32 multiply-add rate, its copy rate, and that of its matrix units; as cases, and their
 * measurement. No model.
 */
import type { Device } from '../src/gpu/device.ts';
import { type Capabilities, defineKernel, type Kernel, runsOn, type Storage } from '../src/gpu/kernel.ts';
import { MATRIX_VARIANTS } from '../src/kernels/matrix.ts';
import type { Case } from '../test/kernels/case.ts';
import { matrixCase, matrixPeak } from './matrix-peak.ts';
import { type Measured, measure, type Work } from './measure.ts';

export const fma: Kernel = defineKernel({
  name: 'bench_fma',
  bindings: { out: { type: 'array<vec4f>', access: 'read_write' } },
  params: { rounds: 'u32' },
  variants: { plain: { files: ['bench/fma.wgsl'] } },
});

export const stream: Kernel = defineKernel({
  name: 'bench_stream',
  bindings: {
    x: { type: 'array<vec4f>', access: 'read_write' },
    out: { type: 'array<vec4f>', access: 'read_write' },
  },
  params: { quads: 'u32' },
  variants: { plain: { files: ['bench/stream.wgsl'] } },
});

const plain = { variant: 'plain', choices: {}, constants: {} } as const;

/** `groups` workgroups of 64 invocations. */
export const fmaCase = (groups: number, rounds: number): Case => ({
  name: 'f32 multiply-add peak',
  kernel: fma,
  build: () => ({
    inputs: {},
    outputs: { out: { as: 'f32', count: groups * 64 * 4 } },
    bytes: 0,
    dispatches: ({ out }) => [
      {
        ...plain,
        kernel: fma,
        operands: { out: out! },
        params: { rounds },
        grid: [groups, 1, 1],
        label: 'f32 multiply-add peak',
        flops: groups * 64 * rounds * 8 * 16 * 2,
      },
    ],
  }),
});

/** A copy of `groups` times 4 KiB. */
export const streamCase = (groups: number): Case => ({
  name: 'copy rate',
  kernel: stream,
  build: () => ({
    inputs: { x: { as: 'f32', values: new Float32Array(groups * 1024) } },
    outputs: { out: { as: 'f32', count: groups * 1024 } },
    bytes: groups * 1024 * 4 * 2,
    dispatches: ({ x, out }) => [
      {
        ...plain,
        kernel: stream,
        operands: { x: x!, out: out! },
        params: { quads: groups * 256 },
        grid: [groups, 1, 1],
        label: 'copy rate',
        flops: 0,
      },
    ],
  }),
});

/** What bounds a kernel. */
export type Bound = 'flops' | 'bytes';

/** GFLOP/s or GB/s. */
export const rateOf = (by: Bound, measured: Pick<Measured, Bound>, ms: number): number =>
  measured[by] / ms / 1e6;

/** `matrix`: of the fastest shape of matrix units that kernels use in f16 storage; undefined where they use none. */
export type Peaks = Readonly<Record<Bound, Measured>> & { readonly matrix?: Measured | undefined };

/** The matrix units' peak, where a kernel is held against that. */
const matrixOf = (peaks: Peaks, by: Bound, storage: Storage): Measured | undefined =>
  by === 'flops' && storage === 'f16' ? peaks.matrix : undefined;

/** The peak that a kernel is held against. */
export const peakOf = (peaks: Peaks, by: Bound, storage: Storage): Measured =>
  matrixOf(peaks, by, storage) ?? peaks[by];

/** Variants for the matrix units that the adapter has. */
export const matrixVariantsOf = (capabilities: Capabilities): readonly string[] =>
  MATRIX_VARIANTS.filter((name) => runsOn(matrixPeak.variants[name]!, capabilities, 'f16'));

/** Milliseconds of each measurement. */
const BUDGET_MS = 400;

const fmaWork = (software: boolean): Work => ({
  one: software ? fmaCase(256, 512) : fmaCase(65535, 64),
  storage: 'f32',
});

const streamWork = (software: boolean): Work => ({
  one: streamCase(software ? 8192 : 16384),
  storage: 'f32',
});

const matrixWork = (software: boolean, variant: string): Work => ({
  one: software ? matrixCase(variant, 64, 16) : matrixCase(variant, 8192, 512),
  storage: 'f16',
  variant,
});

/** The same, to be measured beside the kernel. */
export function peakWorkOf({ capabilities }: Device, peaks: Peaks, by: Bound, storage: Storage): Work {
  const { software } = capabilities;
  const matrix = matrixOf(peaks, by, storage);
  if (matrix) return matrixWork(software, matrix.variant);
  return by === 'bytes' ? streamWork(software) : fmaWork(software);
}

export const matrixPeakOf = (device: Device, variant: string): Promise<Measured> =>
  measure(device, matrixWork(device.capabilities.software, variant), BUDGET_MS);

/** Prints them too. */
export async function peaksOf(device: Device): Promise<Peaks> {
  const { software } = device.capabilities;
  const flops = await measure(device, fmaWork(software), BUDGET_MS);
  const bytes = await measure(device, streamWork(software), BUDGET_MS);
  let matrix: Measured | undefined;
  // Software drivers only imitate such units, and no kernel uses them there.
  for (const variant of software ? [] : matrixVariantsOf(device.capabilities)) {
    const measured = await matrixPeakOf(device, variant);
    if (!matrix || rateOf('flops', measured, measured.ms) > rateOf('flops', matrix, matrix.ms))
      matrix = measured;
  }
  showPeak('multiply-add peak', 'flops', flops);
  if (matrix) showPeak('peak of the matrix units', 'flops', matrix);
  showPeak('copy rate', 'bytes', bytes);
  return { flops, bytes, matrix };
}

function showPeak(name: string, by: Bound, measured: Measured): void {
  const { ms, coreMs } = measured;
  const core = coreMs ? ` (by processor time ${rateOf(by, measured, coreMs).toFixed(1)})` : '';
  console.log(
    `${name}: ${rateOf(by, measured, ms).toFixed(1)}${core} ${by === 'flops' ? 'GFLOP/s' : 'GB/s'}`,
  );
}
