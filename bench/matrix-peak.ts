/**
 * Matrix units as cases: the rate of each shape that the adapter multiplies, and a GEMM whose weights go to the units directly or
 * by way of workgroup memory. Measures nothing.
 */
import { type Capabilities, defineKernel, type Kernel, type MatrixShape } from '../src/gpu/kernel.ts';
import { fromF32 } from '../src/half.ts';
import { lanesOf, matrixVariants } from '../src/kernels/matrix.ts';
import { type Case, random, stored, tolerance } from '../test/kernels/case.ts';

export const matrixPeak: Kernel = defineKernel({
  name: 'bench_matrix',
  bindings: { out: { type: 'array<f32>', access: 'read_write' } },
  params: { rounds: 'u32' },
  constants: { LANES: 32 },
  variants: matrixVariants(['bench/matrix.wgsl']),
});

export const matrixB: Kernel = defineKernel({
  name: 'bench_matrix_b',
  bindings: {
    x: { type: 'array<vec4<Factor>>', access: 'read_write' },
    w: { type: 'array<vec4<Factor>>', access: 'read' },
    out: { type: 'array<f32>', access: 'read_write' },
  },
  params: { k: 'u32', n: 'u32' },
  constants: { LANES: 32, STAGED: true },
  variants: matrixVariants(['bench/matrix_b.wgsl']),
});

const SUBGROUPS = 4;
const CHAINS = 8;

const nameOf = ({ m, n, k, input }: MatrixShape): string => `${input} ${m}x${n}x${k}`;

/** `groups` workgroups of 4 subgroups. */
export function matrixCase(variant: string, groups: number, rounds: number): Case {
  const shape = matrixPeak.variants[variant]!.matrix!;
  const { m, n, k } = shape;
  return {
    name: `matrix units, ${nameOf(shape)}`,
    kernel: matrixPeak,
    variants: [variant],
    build: () => ({
      inputs: {},
      // Room for the widest subgroups there are.
      outputs: { out: { as: 'f32', count: groups * SUBGROUPS * 128 } },
      bytes: 0,
      dispatches: ({ out }, capabilities) => [
        {
          ...{ kernel: matrixPeak, variant, choices: {}, params: { rounds }, operands: { out: out! } },
          constants: lanesOf(matrixPeak.variants[variant], capabilities),
          grid: [groups, 1, 1],
          label: 'matrix peak',
          flops: groups * SUBGROUPS * rounds * CHAINS * 2 * m * n * k,
        },
      ],
    }),
  };
}

/** Of rows, k and columns: `m` and `n` multiples of 64, `k` of 32. Factors are those that the shape of `variant` takes. */
export function matrixBCase(
  variant: string,
  isStaged: boolean,
  [m, k, n]: readonly [number, number, number],
): Case {
  const shape = matrixB.variants[variant]!.matrix!;
  const words = (values: Float32Array): Uint32Array => {
    const bytes = fromF32(shape.input === 'f16' ? 'F16' : 'F32', values);
    return new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
  };
  return {
    name: `${isStaged ? 'staged' : 'direct'} ${m}x${k}x${n}, ${nameOf(shape)}`,
    kernel: matrixB,
    variants: [variant],
    build: () => {
      const x = stored(random('x', m * k), shape.input);
      // [n / 32][k][32]
      const w = stored(random('w', k * n), shape.input);
      return {
        inputs: {
          x: { as: 'words', values: words(x) },
          w: { as: 'words', values: words(w), resident: true },
        },
        outputs: {
          out: {
            as: 'f32',
            count: m * n,
            expected: () => productOf(x, w, m, k, n),
            tolerance: tolerance('f32', 'f32', k),
          },
        },
        bytes: 0,
        dispatches: ({ x: rows, w: panels, out }, capabilities: Capabilities) => [
          {
            ...{ kernel: matrixB, variant, choices: {}, params: { k, n } },
            operands: { x: rows!, w: panels!, out: out! },
            constants: { ...lanesOf(matrixB.variants[variant], capabilities), STAGED: isStaged },
            grid: [n / 64, m / 64, 1],
            label: 'matrix b',
            flops: 2 * m * n * k,
          },
        ],
      };
    },
  };
}

function productOf(x: Float32Array, w: Float32Array, m: number, k: number, n: number): Float64Array {
  const out = new Float64Array(m * n);
  for (let row = 0; row < m; row++)
    for (let column = 0; column < n; column++) {
      const panel = Math.floor(column / 32) * k;
      let sum = 0;
      for (let i = 0; i < k; i++) sum += x[row * k + i]! * w[(panel + i) * 32 + (column % 32)]!;
      out[row * n + column] = sum;
    }
  return out;
}
