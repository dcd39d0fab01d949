/**
 * Cases of the two group norm kernels: both together on one or two sources, and `apply` alone on moments made up for it.
 * The moments are compared too.
 */
import type { Capabilities, Operand, Storage } from '../../src/gpu/kernel.ts';
import { chunksOf, groupApply, groupMoments, groupNormOf } from '../../src/kernels/norm.ts';
import { GUARANTEED } from '../gpu/capabilities.ts';
import {
  type Built,
  bytesOf,
  type Case,
  formatOf,
  type Input,
  random,
  storagesOf,
  stored,
  tolerance,
  type Wide,
} from './case.ts';
import { beside, silu } from './gemm_reference.ts';
import { affineOf, foldOf, momentsOf } from './norm_reference.ts';

export interface GroupNormShape extends Wide {
  readonly name: string;
  readonly images?: number;
  readonly tokens: number;
  readonly channels: number;
  readonly groups?: number;
  readonly split?: number;
  readonly silu?: boolean;
  /** Added to every value of x. */
  readonly offset?: number;
}

const EPS = 1e-5;

/** How the variants cut the tokens: alike up to 512. */
function cutsOf(tokens: number): { readonly mostChunks: number; readonly chunkTokens: number | undefined } {
  const cuts = Object.keys(groupMoments.variants).map((variant) => chunksOf(tokens, GUARANTEED, variant));
  const [first] = cuts;
  const alike = cuts.every(({ chunkTokens }) => chunkTokens === first?.chunkTokens);
  return {
    mostChunks: Math.max(...cuts.map(({ chunks }) => chunks)),
    chunkTokens: alike ? first?.chunkTokens : undefined,
  };
}

interface Data {
  readonly images: number;
  readonly x: Float32Array;
  readonly x2: Float32Array | undefined;
  readonly whole: Float64Array;
  readonly gamma: Float32Array;
  readonly beta: Float32Array;
}

function dataOf(shape: GroupNormShape, storage: Storage): Data {
  const { name, tokens, channels, split, offset = 0 } = shape;
  const images = shape.images ?? 1;
  const rows = images * tokens;
  const x = stored(
    random(`${name} x`, rows * (split ?? channels), offset - 1, offset + 1),
    storage,
    formatOf(shape, 'x'),
  );
  // Another mean and size in the second source, so that a group across the split needs both.
  const x2 = split
    ? stored(
        random(`${name} x2`, rows * (channels - split), offset - 1, offset + 4),
        storage,
        formatOf(shape, 'x2'),
      )
    : undefined;
  const whole = x2 && split ? beside(x, x2, rows, channels, split) : Float64Array.from(x);
  const gamma = random(`${name} gamma`, channels, 0.5, 1.5);
  return { images, x, x2, whole, gamma, beta: random(`${name} beta`, channels) };
}

function applied(whole: Float64Array, affine: ArrayLike<number>, shape: GroupNormShape): Float64Array {
  const { tokens, channels } = shape;
  return whole.map((v, i) => {
    const image = Math.floor(i / (tokens * channels));
    const c = i % channels;
    const y = v * affine[image * 2 * channels + c]! + affine[(image * 2 + 1) * channels + c]!;
    return shape.silu ? silu(y) : y;
  });
}

function dispatchesOf(
  shape: GroupNormShape,
  operands: Readonly<Record<string, Operand>>,
  capabilities: Capabilities,
  variant: string | undefined,
) {
  const any = Object.values(operands)[0]!;
  const operand = (name: string): Operand => operands[name] ?? any;
  const args = {
    label: shape.name,
    images: shape.images ?? 1,
    tokens: shape.tokens,
    channels: shape.channels,
    ...(shape.groups ? { groups: shape.groups } : {}),
    eps: EPS,
    silu: shape.silu ?? false,
    x: operand('x'),
    x2: operands.x2,
    splitChannels: shape.split,
    gamma: operand('gamma'),
    beta: operand('beta'),
    moments: operand('moments'),
    out: operand('out'),
  };
  return groupNormOf(args, capabilities, variant);
}

function sources(shape: GroupNormShape, { x, x2 }: Data): Record<string, Input> {
  return {
    x: { as: formatOf(shape, 'x'), values: x },
    ...(x2 ? { x2: { as: formatOf(shape, 'x2'), values: x2 } } : {}),
  };
}

/** Of x and x2, once. */
function readBytes(shape: GroupNormShape, { x, x2 }: Data, storage: Storage): number {
  const second = x2 ? x2.length * bytesOf(formatOf(shape, 'x2'), storage) : 0;
  return x.length * bytesOf(formatOf(shape, 'x'), storage) + second;
}

const params = ({ gamma, beta }: Data): Record<string, Input> => ({
  gamma: { as: 'f32', values: gamma, resident: true },
  beta: { as: 'f32', values: beta, resident: true },
});

function build(shape: GroupNormShape, storage: Storage): Built {
  const data = dataOf(shape, storage);
  const { images, whole, gamma, beta } = data;
  const { tokens, channels, groups = 32, offset = 0 } = shape;
  const spec = { images, tokens, channels, groups, eps: EPS };
  const { mostChunks, chunkTokens } = cutsOf(tokens);
  const depth = Math.min(tokens, 64) + (channels / groups) * Math.ceil(tokens / 64);
  // x * scale + shift, as PyTorch computes it, rounds at the size of the offset rather than of the result: a few
  // roundoffs of |offset| / deviation (0.58 for uniforms).
  const slack = (4 * 2 ** -24 * Math.abs(offset)) / 0.58;
  return {
    inputs: { ...sources(shape, data), ...params(data) },
    outputs: {
      moments: {
        as: 'f32',
        count: images * mostChunks * 2 * channels,
        ...(chunkTokens && {
          expected: () => momentsOf(whole, images, tokens, channels, chunkTokens),
          tolerance: tolerance('f32', storage, chunkTokens),
        }),
      },
      out: {
        as: 'quad',
        count: whole.length,
        expected: () => applied(whole, affineOf(whole, spec, gamma, beta), shape),
        tolerance: tolerance('quad', storage, depth, slack),
      },
    },
    bytes: 2 * readBytes(shape, data, storage) + whole.length * bytesOf('quad', storage),
    dispatches: (operands, capabilities, variant) => dispatchesOf(shape, operands, capabilities, variant),
  };
}

export const groupNormCase = (shape: GroupNormShape): Case => ({
  name: shape.name,
  kernel: groupMoments,
  ...storagesOf(shape),
  build: (storage) => build(shape, storage),
});

/** `apply` on moments of tokens nobody made: any means and squares will do. */
function applyCase(shape: GroupNormShape): Case {
  const { name, tokens, channels, groups = 32 } = shape;
  return {
    name,
    kernel: groupApply,
    build: (storage) => {
      const data = dataOf(shape, storage);
      const { images, whole, gamma, beta } = data;
      const { mostChunks: chunks, chunkTokens } = cutsOf(tokens);
      if (!chunkTokens) throw new Error(`the variants cut ${tokens} tokens in different ways`);
      const moments = random(`${name} moments`, images * chunks * 2 * channels, 0, 2);
      const spec = { images, tokens, channels, groups, eps: EPS };
      return {
        inputs: { ...sources(shape, data), ...params(data), moments: { as: 'f32', values: moments } },
        outputs: {
          out: {
            as: 'quad',
            count: whole.length,
            expected: () => applied(whole, foldOf(moments, spec, chunkTokens, gamma, beta), shape),
            tolerance: tolerance('quad', storage, (channels / groups) * chunks),
          },
        },
        bytes: readBytes(shape, data, storage) + whole.length * bytesOf('quad', storage),
        dispatches: (operands, capabilities, variant) =>
          dispatchesOf(shape, operands, capabilities, variant).filter(({ kernel }) => kernel === groupApply),
      };
    },
  };
}

const TOKENS = [1, 63, 64, 65, 131];

export const CASES: readonly Case[] = [
  ...[
    ...TOKENS.map((tokens) => ({ name: `${tokens} tokens`, images: 2, tokens, channels: 64 })),
    { name: 'groups of 10 channels', images: 2, tokens: 70, channels: 320, silu: true },
    { name: 'a group across the concatenation', tokens: 65, channels: 960, split: 640, silu: true },
    { name: 'a quad-sized second source', images: 2, tokens: 5, channels: 96, split: 92 },
    { name: 'a wide source', images: 2, tokens: 66, channels: 64, offset: 100, silu: true, wide: ['x'] },
    { name: 'two wide sources', tokens: 9, channels: 96, split: 64, silu: true, wide: ['x', 'x2'] },
    { name: 'one group', tokens: 9, channels: 8, groups: 1 },
    { name: 'many chunks', images: 2, tokens: 4100, channels: 64, silu: true },
    { name: 'an offset of 1000', images: 2, tokens: 200, channels: 64, offset: 1000 },
    { name: 'an offset of -1000 with SiLU', tokens: 1024, channels: 320, offset: -1000, silu: true },
  ].map(groupNormCase),
  ...[
    { name: 'made-up moments', images: 3, tokens: 150, channels: 320 },
    { name: 'made-up moments of 37 groups', tokens: 64, channels: 296, groups: 37 },
    { name: 'made-up moments with SiLU', tokens: 16, channels: 64, silu: true },
    { name: 'made-up moments of 80 channels a group', tokens: 16, channels: 2560 },
    { name: 'made-up moments of one channel a group', images: 2, tokens: 17, channels: 72, groups: 72 },
    { name: 'made-up moments of two sources', images: 2, tokens: 15, channels: 96, split: 60, silu: true },
  ].map(applyCase),
];
