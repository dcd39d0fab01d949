/** Cases of `layer_norm`: rows around the workgroup's number, widths around its lanes, values far from zero. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { layerNorm, layerNormOf } from '../../src/kernels/norm.ts';
import {
  type Built,
  bytesOf,
  type Case,
  formatOf,
  random,
  storagesOf,
  stored,
  tolerance,
  type Wide,
} from './case.ts';
import { layerNormRows } from './norm_reference.ts';

export interface LayerNormShape extends Wide {
  readonly name: string;
  readonly images?: number;
  /** Of one image. */
  readonly rows: number;
  readonly channels: number;
  /** Added to every value of x. */
  readonly offset?: number;
}

const EPS = 1e-5;

function build(shape: LayerNormShape, storage: Storage): Built {
  const { name, images = 1, rows, channels, offset = 0 } = shape;
  const x = stored(
    random(`${name} x`, images * rows * channels, offset - 1, offset + 1),
    storage,
    formatOf(shape, 'x'),
  );
  const gamma = random(`${name} gamma`, channels, 0.5, 1.5);
  const beta = random(`${name} beta`, channels);
  // The mean is rounded at the size of the offset, and all of its row is off by that.
  const slack = (4 * 2 ** -24 * Math.abs(offset)) / 0.58;
  return {
    inputs: {
      x: { as: formatOf(shape, 'x'), values: x },
      gamma: { as: 'f32', values: gamma, resident: true },
      beta: { as: 'f32', values: beta, resident: true },
    },
    outputs: {
      out: {
        as: 'quad',
        count: x.length,
        expected: () => layerNormRows(x, channels, gamma, beta, EPS),
        tolerance: tolerance('quad', storage, channels, slack),
      },
    },
    bytes: x.length * (bytesOf(formatOf(shape, 'x'), storage) + bytesOf('quad', storage)),
    dispatches: ({ x, gamma, beta, out }, capabilities, variant) => [
      layerNormOf(
        { label: name, images, rows, channels, eps: EPS, x: x!, gamma: gamma!, beta: beta!, out: out! },
        capabilities,
        variant,
      ),
    ],
  };
}

export const layerNormCase = (shape: LayerNormShape): Case => ({
  name: shape.name,
  kernel: layerNorm,
  ...(shape.channels > 320 || shape.channels % 8 !== 0 ? { variants: ['lanes', 'shared'] } : {}),
  ...storagesOf(shape),
  build: (storage) => build(shape, storage),
});

export const CASES: readonly Case[] = [
  ...[1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 129].map((rows) => ({ name: `${rows} rows`, rows, channels: 72 })),
  ...[4, 8, 60, 64, 68, 312, 316, 1280].map((channels) => ({
    name: `${channels} channels`,
    rows: 7,
    channels,
  })),
  { name: 'three images', images: 3, rows: 9, channels: 72 },
  { name: 'wide rows', rows: 65, channels: 320, wide: ['x'] },
  { name: 'an offset of 1000', rows: 5, channels: 320, offset: 1000 },
].map(layerNormCase);
