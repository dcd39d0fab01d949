/** What an adapter can do at most: its f32 multiply-add rate and its copy rate, as cases the benchmark times. No model. */
import { defineKernel, type Kernel } from '../src/gpu/kernel.ts';
import type { Case } from '../test/kernels/case.ts';

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
