/** What an adapter can do at most: its f32 multiply-add rate and its copy rate, as cases, and their measurement. No model. */
import type { Device } from '../src/gpu/device.ts';
import { defineKernel, type Kernel } from '../src/gpu/kernel.ts';
import type { Case } from '../test/kernels/case.ts';
import { type Measured, measure } from './measure.ts';

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

/** Prints them too. */
export async function peaksOf(device: Device): Promise<Readonly<Record<Bound, Measured>>> {
  const { software } = device.capabilities;
  const budgetMs = 400;
  const peak = {
    flops: await measure(device, software ? fmaCase(256, 512) : fmaCase(65535, 64), 'f32', { budgetMs }),
    bytes: await measure(device, streamCase(software ? 8192 : 16384), 'f32', { budgetMs }),
  };
  for (const [by, name, unit] of [
    ['flops', 'multiply-add peak', 'GFLOP/s'],
    ['bytes', 'copy rate', 'GB/s'],
  ] as const) {
    const { ms, coreMs } = peak[by];
    const core = coreMs ? ` (by processor time ${rateOf(by, peak[by], coreMs).toFixed(1)})` : '';
    console.log(`${name}: ${rateOf(by, peak[by], ms).toFixed(1)}${core} ${unit}`);
  }
  return peak;
}
