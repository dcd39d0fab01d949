/**
 * Which variant an adapter gets: the matrix units that it has, where they round nothing, what it got without them, and what was
 * measured on it.
 */
import { describe, expect, test } from 'vitest';
import type { Capabilities, Choice, MatrixShape } from '../../src/gpu/kernel.ts';
import { attention } from '../../src/kernels/attention.ts';
import { gemm } from '../../src/kernels/gemm.ts';
import { pick, type Shape } from '../../src/kernels/pick.ts';
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

  test('convolutions with full runs and tiles go by Winograd where subgroups have 8 lanes', () => {
    const of = (rows: number, runs: number, { lanes = 8, format = 'f16' as 'f16' | 'f32' } = {}) =>
      pick(gemm, adapter(lanes, lanes === 8, []), { rows, runs, format }).choice.variant;
    expect([of(256, 64), of(64, 16), of(220, 64)]).toEqual(['winograd', 'winograd', 'winograd']);
    expect([of(32, 8), of(256, 64, { format: 'f32' })]).toEqual(['winograd', 'winograd']);
    expect([of(16, 4), of(120, 36), of(81, 27)]).toEqual(['broadcast8', 'broadcast32', 'broadcast32']);
    expect([of(256, 0), of(256, 64, { lanes: 32 })]).toEqual(['broadcast32', 'tile']);
  });

  test('attention leaves heads of odd widths and of more than 160 to other variants', () => {
    const of = (headDim: number) =>
      pick(attention, adapter(32, false, NVIDIA), { headDim, format: 'f16' }).choice.variant;
    expect([40, 160, 6, 164].map(of)).toEqual(['sgm16', 'sgm16', 'scalar', 'direct']);
  });

  const software = adapter(8, true, []);
  const conv: Shape = { format: 'f16', a: 'conv3', images: 1, rows: 4096, columns: 320, depth: 2880 };
  const POINT = 'gemm format=f16 a=conv3 images=1 rows=4096 columns=256 depth=2048';
  const tuned = (choice: Choice): Capabilities => ({ ...software, tuned: new Map([[POINT, choice]]) });

  test('tells what else the adapter could run, the rules first, and at which point', () => {
    expect(pick(gemm, software, conv)).toEqual({
      choice: { variant: 'broadcast32' },
      decision: {
        point: POINT,
        candidates: ['broadcast32', 'broadcast8', 'tile'].map((variant) => ({ variant })),
      },
    });
    // Without subgroups and units there is nothing to choose.
    expect(pick(gemm, adapter(0, false, []), conv)).toEqual({ choice: { variant: 'tile' } });
  });

  test('takes what was measured at the point, as long as it is a candidate', () => {
    expect(pick(gemm, tuned({ variant: 'broadcast8' }), conv).choice).toEqual({ variant: 'broadcast8' });
    const near = { ...conv, rows: 72 * 72, columns: 324 };
    expect(pick(gemm, tuned({ variant: 'broadcast8' }), near).choice).toEqual({ variant: 'broadcast8' });
    const elsewhere = [
      { ...conv, rows: 1024 },
      { ...conv, images: 2 },
      { ...conv, a: 'linear' },
    ];
    for (const shape of elsewhere)
      expect(pick(gemm, tuned({ variant: 'broadcast8' }), shape).choice).toEqual({ variant: 'broadcast32' });
    for (const choice of [{ variant: 'sgm16' }, { variant: 'gone' }, { variant: 'tile', more: 1 }])
      expect(pick(gemm, tuned(choice), conv).choice).toEqual({ variant: 'broadcast32' });
  });

  test('takes a variant that is asked for, whatever was measured', () => {
    expect(pick(gemm, tuned({ variant: 'broadcast8' }), conv, 'tile')).toEqual({
      choice: { variant: 'tile' },
    });
  });
});
