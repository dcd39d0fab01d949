/** Into how many parts the rules cut K: a function of one image's tiles and of k, whatever the batch. */
import { describe, expect, test } from 'vitest';
import type { Capabilities, Choice } from '../../src/gpu/kernel.ts';
import type { GemmSizes, Rows } from '../../src/kernels/gemm.ts';
import { gemmChoice } from '../../src/kernels/split_k.ts';
import { GUARANTEED } from '../gpu/capabilities.ts';

const linear: Rows = { kind: 'linear' };
const conv: Rows = {
  kind: 'conv3',
  srcHeight: 8,
  srcWidth: 8,
  inHeight: 8,
  inWidth: 8,
  outWidth: 8,
  stride: 1,
};

const splits = (sizes: Partial<GemmSizes>, capabilities: Capabilities = GUARANTEED): number =>
  gemmChoice({ images: 1, m: 64, n: 1280, channels: 1280, rows: linear, ...sizes }, capabilities).splits;

describe('the parts of K', () => {
  test.each<[number, string, Partial<GemmSizes>]>([
    [12, 'a convolution of 8x8 pixels', { rows: conv }],
    [12, 'a convolution of 8x8 pixels with a skip', { rows: conv, channels: 2560 }],
    [3, 'a convolution of 16x16 pixels', { rows: conv, m: 256 }],
    [1, 'a convolution of 32x32 pixels', { rows: conv, m: 1024, n: 640, channels: 640 }],
    [5, 'a linear layer of 8x8 pixels', {}],
    [1, 'q, k and v of 8x8 pixels', { n: 3840 }],
    [1, 'q, k and v of 16x16 pixels', { n: 3840, m: 256 }],
    [3, 'the second layer of a feed-forward at 16x16 pixels', { m: 256, channels: 5120 }],
    [1, 'a linear layer of 16x16 pixels', { m: 256 }],
    [1, 'gates of 8x8 pixels', { n: 5120, gated: true }],
    [5, 'one row', { m: 1 }],
    [1, 'a short sum', { channels: 320 }],
  ])('are %i in %s', (expected, _, sizes) => {
    expect(splits(sizes)).toBe(expected);
  });

  test('are one on a software adapter and for variants that cannot cut', () => {
    expect(splits({ rows: conv }, { ...GUARANTEED, software: true })).toBe(1);
    expect(splits({ rows: conv }, { ...GUARANTEED, subgroupSize: 8 })).toBe(1);
  });

  test('are what was measured, where the rules say the variant can be cut so', () => {
    const sizes: GemmSizes = { images: 1, m: 64, n: 1280, channels: 1280, rows: linear };
    const { decision } = gemmChoice(sizes, GUARANTEED);
    expect(decision!.candidates).toEqual([
      { variant: 'tile', splits: 5 },
      { variant: 'tile' },
      { variant: 'tile', splits: 2 },
      { variant: 'tile', splits: 4 },
    ]);
    const tuned = (choice: Choice): Capabilities => ({
      ...GUARANTEED,
      tuned: new Map([[decision!.point, choice]]),
    });
    expect(gemmChoice(sizes, tuned({ variant: 'tile', splits: 2 })).splits).toBe(2);
    expect(gemmChoice(sizes, tuned({ variant: 'tile' })).splits).toBe(1);
    expect(gemmChoice(sizes, tuned({ variant: 'tile', splits: 64 })).splits).toBe(5);
  });
});
