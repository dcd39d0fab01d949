/** Shapes that `gemm` and `lora_down` are tried at: around the tiles, every epilogue, stacks that differ. Data only. */
import type { Wide } from './case.ts';
import type { ConvShape } from './gemm_reference.ts';
import type { LoraShape, Stacks } from './lora_tables.ts';

export interface GemmShape extends Wide {
  readonly name: string;
  readonly images?: number;
  /** Rows of an image; a convolution knows its own. */
  readonly m?: number;
  readonly channels: number;
  readonly n: number;
  readonly split?: number;
  readonly conv?: ConvShape;
  readonly bias?: boolean;
  readonly add?: 'row' | 'image';
  readonly silu?: boolean;
  /** The layer has 2 * n columns. */
  readonly gated?: boolean;
  /** Columns of a segment of `out`, and of `add` where there is one. */
  readonly segment?: number;
  /** Weights in 8-bit blocks. */
  readonly blocks?: boolean;
  /** Panels of a first weight buffer; the rest lie in a second one. */
  readonly splitPanels?: number;
  /** Parts that K is cut into, by the variants that can. */
  readonly splits?: number;
  /** Each image is run by itself, as where images bind different weights. */
  readonly imageByImage?: boolean;
  /** Stacks of the layer itself. */
  readonly lora?: Stacks<LoraShape>;
  /** Stacks of layers that read the same tensor, whose down projection is the same dispatch. */
  readonly beside?: readonly Stacks<LoraShape>[];
}

export const image = (height: number, width: number, stride: 1 | 2 = 1): ConvShape => ({
  srcHeight: height,
  srcWidth: width,
  inHeight: height,
  inWidth: width,
  stride,
});

const scaled = (from: readonly [number, number], to: readonly [number, number]): ConvShape => ({
  srcHeight: from[0],
  srcWidth: from[1],
  inHeight: to[0],
  inWidth: to[1],
  stride: 1,
});

/** Images without a stack, with one, with two of different ranks; ranks below, at and above a block. */
export const STACKS: Stacks<LoraShape> = [
  [{ rank: 4, scale: 0.75 }],
  [],
  [
    { rank: 8, scale: -0.5 },
    { rank: 17, scale: 1.25 },
  ],
];

/** Around a block of 8 ranks, around the four blocks that one workgroup may take, and as high as adapters go. */
const RANKS = [1, 7, 8, 9, 16, 24, 32, 33, 64, 256];

/** Shapes share modules where they can: lavapipe takes 1 to 3 s to compile one. */
export const BIASED = { bias: true, add: 'row' } as const;
export const BY_IMAGE = { bias: true, add: 'image', silu: true } as const;

export const GEMM_SHAPES: readonly GemmShape[] = [
  { name: 'one row', m: 1, channels: 8, n: 4 },
  { name: 'a long sum', m: 3, channels: 5120, n: 32 },
  { name: 'rows one under the tile', m: 63, channels: 24, n: 28, ...BIASED },
  { name: 'rows of a whole tile', m: 64, channels: 64, n: 64, ...BIASED },
  { name: 'rows one over the tile', m: 65, channels: 40, n: 36, ...BIASED },
  {
    name: 'a prime number of rows in two images',
    images: 2,
    m: 37,
    channels: 320,
    n: 100,
    bias: true,
    silu: true,
  },
  { name: 'an add per image', images: 3, m: 5, channels: 16, n: 44, ...BY_IMAGE },
  {
    name: 'panels in two weight buffers',
    m: 70,
    channels: 48,
    n: 132,
    ...BIASED,
    splitPanels: 3,
  },
  { name: 'an odd number of panels first', images: 2, m: 9, channels: 16, n: 128, ...BIASED, splitPanels: 1 },
  { name: 'two tensors side by side', images: 2, m: 33, channels: 48, n: 40, split: 32, bias: true },
  { name: 'two tensors of odd quads side by side', m: 66, channels: 24, n: 32, split: 12, bias: true },
  { name: 'a convolution of one pixel', channels: 8, n: 8, conv: image(1, 1), bias: true },
  { name: 'a convolution of two images', images: 2, channels: 16, n: 36, conv: image(9, 7), ...BY_IMAGE },
  { name: 'a convolution with a residual', channels: 8, n: 32, conv: image(8, 8), ...BIASED },
  {
    name: 'a convolution of stride 2',
    images: 2,
    channels: 8,
    n: 12,
    conv: image(8, 6, 2),
    bias: true,
  },
  {
    name: 'a convolution of stride 2 over odd sides',
    channels: 24,
    n: 32,
    conv: image(9, 5, 2),
    bias: true,
  },
  {
    name: 'a convolution of the image scaled up twice',
    channels: 8,
    n: 20,
    conv: scaled([4, 5], [8, 10]),
    bias: true,
  },
  {
    name: 'a convolution of the image scaled up to odd sides',
    images: 2,
    channels: 16,
    n: 32,
    conv: scaled([5, 3], [9, 6]),
    bias: true,
  },
  {
    name: 'low-rank terms that differ by image',
    images: 3,
    m: 19,
    channels: 32,
    n: 68,
    lora: STACKS,
    ...BIASED,
  },
  {
    name: 'low-rank terms over more rows than a tile',
    images: 3,
    m: 71,
    channels: 16,
    n: 36,
    lora: STACKS,
    ...BIASED,
  },
  {
    name: 'low-rank terms beside two tensors',
    images: 3,
    m: 9,
    channels: 24,
    n: 32,
    split: 8,
    lora: STACKS,
    bias: true,
  },
  {
    name: 'low-rank terms of a convolution',
    images: 3,
    channels: 8,
    n: 32,
    conv: image(5, 5, 2),
    lora: STACKS,
    bias: true,
    add: 'image',
  },
  {
    name: 'low-rank terms of a convolution of stride 1',
    images: 3,
    channels: 16,
    n: 36,
    conv: image(6, 7),
    lora: STACKS,
    ...BY_IMAGE,
  },
  {
    name: 'a convolution of runs of more than two tiles',
    channels: 24,
    n: 68,
    conv: image(17, 9),
    ...BIASED,
  },
  { name: 'a wide residual', m: 33, channels: 16, n: 36, ...BIASED, wide: ['add', 'out'] },
  { name: 'a wide input', images: 2, m: 9, channels: 24, n: 32, bias: true, wide: ['x', 'out'] },
  {
    name: 'two wide tensors side by side',
    m: 9,
    channels: 24,
    n: 32,
    split: 16,
    bias: true,
    wide: ['x', 'x2', 'out'],
  },
  {
    name: 'a convolution of wide pixels',
    channels: 16,
    n: 32,
    conv: image(4, 6, 2),
    bias: true,
    add: 'row',
    wide: ['x', 'add', 'out'],
  },
  {
    name: 'low-rank terms of a convolution by 8-bit blocks with a wide residual',
    images: 2,
    channels: 32,
    n: 32,
    conv: image(8, 8),
    blocks: true,
    lora: [[{ rank: 12, scale: 0.5 }], [{ rank: 3, scale: -1 }]],
    ...BIASED,
    wide: ['add', 'out'],
  },
  {
    name: 'low-rank terms of a wide input',
    images: 3,
    m: 9,
    channels: 16,
    n: 32,
    lora: STACKS,
    ...BIASED,
    wide: ['x', 'add', 'out'],
  },
  { name: 'weights in 8-bit blocks', m: 65, channels: 96, n: 68, blocks: true, ...BIASED },
  {
    name: 'few rows by weights in 8-bit blocks',
    images: 2,
    m: 3,
    channels: 32,
    n: 36,
    blocks: true,
    bias: true,
  },
  {
    name: 'weights in 8-bit blocks beside low-rank terms',
    images: 3,
    m: 19,
    channels: 64,
    n: 36,
    blocks: true,
    lora: STACKS,
    ...BIASED,
  },
  {
    name: 'a convolution by 8-bit blocks',
    images: 2,
    channels: 32,
    n: 36,
    conv: image(5, 7),
    blocks: true,
    bias: true,
  },
  { name: 'two tensors by 8-bit blocks', m: 9, channels: 64, n: 32, split: 24, blocks: true, bias: true },
  ...RANKS.map(
    (rank): GemmShape => ({
      name: `low-rank terms of rank ${rank}`,
      images: 2,
      m: 21,
      channels: 24,
      n: 36,
      lora: [[{ rank, scale: 0.5 }], [{ rank: 3, scale: -1 }]],
      ...BIASED,
    }),
  ),
  {
    name: 'a stack of ranks 1 to 64',
    m: 67,
    channels: 40,
    n: 32,
    lora: [[1, 64, 8, 9, 32, 7].map((rank, i) => ({ rank, scale: (i - 2) / 4 }))],
    ...BIASED,
  },
  {
    name: 'low-rank terms of three layers in one down projection',
    images: 3,
    m: 19,
    channels: 32,
    n: 36,
    beside: [STACKS.toReversed(), [[], [], [{ rank: 33, scale: 0.5 }]]],
    lora: STACKS,
    ...BIASED,
  },
  {
    name: 'no low-rank terms beside those of a layer that reads the same',
    images: 2,
    m: 5,
    channels: 8,
    n: 8,
    beside: [[[{ rank: 4, scale: 1 }], []]],
    lora: [[], [{ rank: 12, scale: 1 }]],
    ...BIASED,
  },
  { name: 'gates', images: 2, m: 37, channels: 40, n: 96, bias: true, gated: true },
  { name: 'gates of few rows', images: 2, m: 5, channels: 24, n: 32, gated: true },
  { name: 'gates in 8-bit blocks', m: 37, channels: 64, n: 32, bias: true, gated: true, blocks: true },
  {
    name: 'low-rank terms of gates',
    images: 3,
    m: 19,
    channels: 24,
    n: 64,
    bias: true,
    gated: true,
    lora: STACKS,
  },
  {
    name: 'segments of columns',
    images: 2,
    m: 35,
    channels: 24,
    n: 96,
    bias: true,
    segment: 32,
  },
  {
    name: 'an add per image from segments of columns',
    images: 3,
    m: 5,
    channels: 16,
    n: 96,
    ...BY_IMAGE,
    segment: 32,
  },
  { name: 'low-rank terms of no image', images: 2, m: 5, channels: 8, n: 8, lora: [[], []], ...BIASED },
];
