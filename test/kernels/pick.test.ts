/** Which variant an adapter gets: the matrix units that it has, where they round nothing, and what it got without them. */
import { describe, expect, test } from 'vitest';
import type { Capabilities, MatrixShape } from '../../src/gpu/kernel.ts';
import { attention } from '../../src/kernels/attention.ts';
import { gemm } from '../../src/kernels/gemm.ts';
import { pick } from '../../src/kernels/pick.ts';
import { GUARANTEED } from '../gpu/capabilities.ts';

const adapter = (
  subgroupSize: number,
  software: boolean,
  matrices: readonly MatrixShape[],
): Capabilities => ({ ...GUARANTEED, subgroupSize, software, matrices });

const halves = (m: number, n: number, k: number): MatrixShape => ({ m, n, k, input: 'f16' });

const NVIDIA = [halves(16, 8, 8), halves(16, 8, 16), halves(16, 16, 16)];
const METAL: readonly MatrixShape[] = [{ m: 8, n: 8, k: 8, input: 'f32' }];

describe('pick', () => {
  test.each<[string, Capabilities, string, string]>([
    ['units of 16x16x16 halves', adapter(32, false, NVIDIA), 'tile', 'sgm16'],
    ['units of 16x8 halves alone', adapter(32, false, NVIDIA.slice(0, 2)), 'tile', 'sgm16x8'],
    ['units of 8x8x8 f32', adapter(32, false, METAL), 'sgm8_f32', 'sgm8_f32'],
    ['units of a shape that no variant has', adapter(32, false, [halves(32, 8, 16)]), 'tile', 'tile'],
    ['units and subgroups whose size varies', adapter(0, false, NVIDIA), 'tile', 'tile'],
    ['no units', adapter(32, false, []), 'tile', 'tile'],
    [
      'units that a software driver imitates',
      adapter(8, true, [halves(8, 8, 8)]),
      'broadcast32',
      'broadcast32',
    ],
  ])('a GEMM on an adapter with %s', (_, capabilities, inF32, inF16) => {
    expect(pick(gemm, capabilities, { rows: 64, format: 'f32' }).choice.variant).toBe(inF32);
    expect(pick(gemm, capabilities, { rows: 64, format: 'f16' }).choice.variant).toBe(inF16);
  });

  test('attention leaves heads of odd widths and of more than 160 to other variants', () => {
    const of = (headDim: number) =>
      pick(attention, adapter(32, false, NVIDIA), { headDim, format: 'f16' }).choice.variant;
    expect([40, 160, 6, 164].map(of)).toEqual(['sgm16', 'sgm16', 'scalar', 'direct']);
  });
});
