/**
 * Cases of the three group norm kernels: all together on one or two sources, and `fold` and `apply` alone on statistics
 * and affines made up for them. Every intermediate is compared too.
 */
import type { Kernel, Operand, Storage } from '../../src/gpu/kernel.ts';
import { groupApply, groupFold, groupMoments, groupNormOf } from '../../src/kernels/norm.ts';
import {
  type Built,
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
import { affineOf, momentsOf } from './norm_reference.ts';

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
/** Tokens of a chunk, as src/kernels/norm.ts has them; the moments' shape shows it. */
const CHUNK = 64;

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

function dispatchesOf(shape: GroupNormShape, operands: Readonly<Record<string, Operand>>, only?: Kernel) {
  const any = Object.values(operands)[0]!;
  const operand = (name: string): Operand => operands[name] ?? any;
  const all = groupNormOf({
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
    affine: operand('affine'),
    out: operand('out'),
  });
  return only ? all.filter(({ kernel }) => kernel === only) : all;
}

function sources(shape: GroupNormShape, { x, x2 }: Data): Record<string, Input> {
  return {
    x: { as: formatOf(shape, 'x'), values: x },
    ...(x2 ? { x2: { as: formatOf(shape, 'x2'), values: x2 } } : {}),
  };
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
  const depth = Math.min(tokens, CHUNK) + (channels / groups) * Math.ceil(tokens / CHUNK);
  // x * scale + shift, as PyTorch computes it, rounds at the size of the offset rather than of the result: a few
  // roundoffs of |offset| / deviation (0.58 for uniforms).
  const slack = (4 * 2 ** -24 * Math.abs(offset)) / 0.58;
  return {
    inputs: { ...sources(shape, data), ...params(data) },
    outputs: {
      moments: {
        as: 'f32',
        count: images * Math.ceil(tokens / CHUNK) * 2 * channels,
        expected: () => momentsOf(whole, images, tokens, channels, CHUNK),
        tolerance: tolerance('f32', storage, CHUNK),
      },
      affine: {
        as: 'f32',
        count: images * 2 * channels,
        expected: () => affineOf(whole, spec, gamma, beta),
        tolerance: tolerance('f32', storage, depth),
      },
      out: {
        as: 'quad',
        count: whole.length,
        expected: () => applied(whole, affineOf(whole, spec, gamma, beta), shape),
        tolerance: tolerance('quad', storage, depth, slack),
      },
    },
    bytes: 3 * whole.length * (storage === 'f16' ? 2 : 4),
    dispatches: (operands) => dispatchesOf(shape, operands),
  };
}

export const groupNormCase = (shape: GroupNormShape): Case => ({
  name: shape.name,
  kernel: groupMoments,
  ...storagesOf(shape),
  build: (storage) => build(shape, storage),
});

/** `fold` on moments of tokens nobody made: any means and squares will do. */
function foldCase(shape: GroupNormShape): Case {
  const { name, tokens, channels, groups = 32 } = shape;
  const images = shape.images ?? 1;
  const chunks = Math.ceil(tokens / CHUNK);
  return {
    name,
    kernel: groupFold,
    build: (storage) => {
      const moments = random(`${name} moments`, images * chunks * 2 * channels, 0, 2);
      const gamma = random(`${name} gamma`, channels, 0.5, 1.5);
      const beta = random(`${name} beta`, channels);
      const expected = (): Float64Array => foldOf(moments, shape, gamma, beta);
      return {
        inputs: {
          moments: { as: 'f32', values: moments },
          gamma: { as: 'f32', values: gamma, resident: true },
          beta: { as: 'f32', values: beta, resident: true },
        },
        outputs: {
          affine: {
            as: 'f32',
            count: images * 2 * channels,
            expected,
            tolerance: tolerance('f32', storage, (channels / groups) * chunks),
          },
        },
        bytes: moments.length * 4,
        dispatches: (operands) => dispatchesOf(shape, operands, groupFold),
      };
    },
  };
}

function foldOf(
  moments: Float32Array,
  shape: GroupNormShape,
  gamma: Float32Array,
  beta: Float32Array,
): Float64Array {
  const { tokens, channels, groups = 32 } = shape;
  const chunks = Math.ceil(tokens / CHUNK);
  const wide = channels / groups;
  const images = shape.images ?? 1;
  const out = new Float64Array(images * 2 * channels);
  for (let at = 0; at < images * groups; at++) {
    const image = Math.floor(at / groups);
    const parts: { n: number; mean: number; m2: number }[] = [];
    for (let chunk = 0; chunk < chunks; chunk++)
      for (let c = (at % groups) * wide; c < ((at % groups) + 1) * wide; c++) {
        const base = (image * chunks + chunk) * 2 * channels + c;
        const n = Math.min(CHUNK, tokens - chunk * CHUNK);
        parts.push({ n, mean: moments[base]!, m2: moments[base + channels]! });
      }
    const count = tokens * wide;
    const mean = parts.reduce((sum, part) => sum + part.n * part.mean, 0) / count;
    const m2 = parts.reduce((sum, part) => sum + part.m2 + part.n * (part.mean - mean) ** 2, 0);
    for (let c = (at % groups) * wide; c < ((at % groups) + 1) * wide; c++) {
      const scale = gamma[c]! / Math.sqrt(m2 / count + EPS);
      out[image * 2 * channels + c] = scale;
      out[(image * 2 + 1) * channels + c] = beta[c]! - mean * scale;
    }
  }
  return out;
}

/** `apply` on any scale and shift. */
function applyCase(shape: GroupNormShape): Case {
  return {
    name: shape.name,
    kernel: groupApply,
    build: (storage) => {
      const data = dataOf(shape, storage);
      const affine = random(`${shape.name} affine`, data.images * 2 * shape.channels, -2, 2);
      return {
        inputs: { ...sources(shape, data), affine: { as: 'f32', values: affine } },
        outputs: {
          out: {
            as: 'quad',
            count: data.whole.length,
            expected: () => applied(data.whole, affine, shape),
            tolerance: tolerance('quad', storage, 4),
          },
        },
        bytes: 2 * data.whole.length * (storage === 'f16' ? 2 : 4),
        dispatches: (operands) => dispatchesOf(shape, operands, groupApply),
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
    { name: 'an offset of 1000', images: 2, tokens: 200, channels: 64, offset: 1000 },
    { name: 'an offset of -1000 with SiLU', tokens: 1024, channels: 320, offset: -1000, silu: true },
  ].map(groupNormCase),
  ...[
    { name: 'made-up moments', images: 3, tokens: 150, channels: 320 },
    { name: 'made-up moments of 37 groups', tokens: 64, channels: 148, groups: 37 },
  ].map(foldCase),
  ...[
    { name: 'a made-up affine', images: 2, tokens: 17, channels: 68 },
    { name: 'a made-up affine with SiLU', tokens: 16, channels: 64, silu: true },
    { name: 'a made-up affine of many tokens', tokens: 1031, channels: 256, silu: true },
    { name: 'a made-up affine over two sources', images: 2, tokens: 15, channels: 72, split: 60, silu: true },
  ].map(applyCase),
];
