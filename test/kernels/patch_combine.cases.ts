/** Cases of `patch_combine`: every source of a factor, every dtype, a second factor by rows, by columns and repeated, with and without a base. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { fromF32, toF32 } from '../../src/half.ts';
import { combine, combineOf, type Factor } from '../../src/kernels/patch.ts';
import { type Built, type Case, type Input, random, stored, tolerance } from './case.ts';
import { panelsOf } from './gemm_reference.ts';
import {
  BEFORE,
  behind,
  CONV,
  EVEN,
  LINEAR,
  padded,
  resident,
  type Shaped,
  SMALL,
  sizeOf,
  tapsFirst,
  times,
  wordsInput,
} from './patch_shapes.ts';

interface CombineShape extends Shaped {
  readonly keep: number;
  readonly x:
    | {
        readonly kind: 'dense';
        readonly dtype: string;
        readonly rowDiv?: number;
        readonly columnDiv?: number;
      }
    | { readonly kind: 'blocks' | 'product'; readonly rank: number };
  readonly y?: readonly [rows: number, columns: number];
  readonly base?: boolean;
}

interface MadeFactor {
  readonly inputs: Readonly<Record<string, Input>>;
  readonly x: (operands: Parameters<Built['dispatches']>[0]) => Factor;
  /** [rows][columns]. */
  readonly values: ArrayLike<number>;
}

function denseFactor({ name, shape, x }: CombineShape & { x: { kind: 'dense' } }): MadeFactor {
  const { rows, channels, taps } = shape;
  const { dtype, rowDiv = 1, columnDiv = 1 } = x;
  const stride = (channels * taps) / columnDiv;
  const bytes = fromF32(dtype as 'F32', random(`${name} x`, (rows / rowDiv) * stride));
  const matrix = toF32(dtype, bytes);
  const columns = channels * taps;
  return {
    inputs: { x: wordsInput(bytes) },
    x: (o) => ({ kind: 'dense', operand: o.x!, at: BEFORE, dtype, stride, rowDiv, columnDiv }),
    values: Float32Array.from(
      { length: rows * columns },
      (_, i) => matrix[Math.floor(i / columns / rowDiv) * stride + Math.floor((i % columns) / columnDiv)]!,
    ),
  };
}

function blocksFactor({ name, shape }: CombineShape, rank: number, storage: Storage): MadeFactor {
  const { rows, channels, taps } = shape;
  const down = stored(random(`${name} down`, rank * channels * taps), storage);
  const up = stored(random(`${name} up`, rows * rank), storage);
  const k = taps * padded(shape);
  const downs = tapsFirst(down, rank, shape);
  const count = Math.ceil(rank / 8);
  const pool: number[] = new Array(BEFORE * 4).fill(0);
  for (let block = 0; block < count; block++) {
    const slice = downs.slice(block * 8 * k, (block + 1) * 8 * k);
    pool.push(...panelsOf(slice, slice.length / k, k, 8));
    const ups = Float32Array.from({ length: rows * 8 }, (_, i) => {
      const r = block * 8 + (i % 8);
      return r < rank ? up[Math.floor(i / 8) * rank + r]! : 0;
    });
    pool.push(...panelsOf(ups, rows, 8, 32));
  }
  return {
    inputs: { blocks: { as: 'quad', values: Float32Array.from(pool), resident: true } },
    x: (o) => ({ kind: 'blocks', operand: o.blocks!, at: BEFORE, count, paddedChannels: padded(shape) }),
    values: times(up, down, rows, rank, channels * taps),
  };
}

function productFactor({ name, shape }: CombineShape, rank: number): MadeFactor {
  const { rows, channels, taps } = shape;
  const left = random(`${name} left`, rows * rank * taps);
  const right = random(`${name} right`, rank * channels);
  const values = new Float64Array(sizeOf(shape));
  for (let tap = 0; tap < taps; tap++) {
    const slice = Float32Array.from({ length: rows * rank }, (_, i) => left[i * taps + tap]!);
    times(slice, right, rows, rank, channels).forEach((value, i) => {
      values[i * taps + tap] = value;
    });
  }
  return {
    inputs: { x: behind(left), right: behind(right) },
    x: (o) => ({
      kind: 'product',
      operand: o.x!,
      at: BEFORE,
      right: { operand: o.right!, at: BEFORE },
      rank,
      taps,
    }),
    values,
  };
}

function factorOf(one: CombineShape, storage: Storage): MadeFactor {
  const { x } = one;
  if (x.kind === 'dense') return denseFactor({ ...one, x });
  return x.kind === 'blocks' ? blocksFactor(one, x.rank, storage) : productFactor(one, x.rank);
}

function buildCombine(one: CombineShape, storage: Storage): Built {
  const { name, shape, keep, y, base } = one;
  const columns = shape.channels * shape.taps;
  const before = random(`${name} before`, sizeOf(shape));
  const made = factorOf(one, storage);
  const factor = y && random(`${name} y`, y[0] * y[1]);
  const scale = -0.75;
  // The first dispatch fills `out`, so that the second has something to keep.
  const fill: Factor = { kind: 'dense', operand: undefined as never, at: 0, stride: columns };
  const depth = one.x.kind === 'dense' ? 3 : one.x.rank + 3;
  return {
    inputs: {
      ...made.inputs,
      before: resident(before),
      ...(factor ? { y: behind(factor) } : {}),
    },
    outputs: {
      out: {
        as: 'f32',
        count: before.length,
        expected: () =>
          Float64Array.from(before, (value, i) => {
            const [row, column] = [Math.floor(i / columns), i % columns];
            const by = factor && y ? factor[(row % y[0]) * y[1] + (column % y[1])]! : 1;
            return keep * value + scale * made.values[i]! * by;
          }),
        tolerance: tolerance('f32', storage, depth),
      },
    },
    bytes: before.length * 12,
    dispatches: (o) => {
      const args = {
        label: name,
        shape,
        keep,
        scale,
        x: made.x(o),
        ...(y ? { y: { operand: o.y!, at: BEFORE, rows: y[0], columns: y[1] } } : {}),
        out: o.out!,
      };
      if (base) return [combineOf({ ...args, base: o.before! })];
      const filled = { ...fill, operand: o.before! };
      return [combineOf({ label: name, shape, keep: 0, scale: 1, x: filled, out: o.out! }), combineOf(args)];
    },
  };
}

const COMBINED: readonly CombineShape[] = [
  { name: 'a full difference', shape: CONV, keep: 1, x: { kind: 'dense', dtype: 'F32' } },
  { name: 'a full difference in F16', shape: LINEAR, keep: 1, x: { kind: 'dense', dtype: 'F16' } },
  { name: 'a full difference in BF16', shape: SMALL, keep: 1, x: { kind: 'dense', dtype: 'BF16' } },
  {
    name: 'a vector',
    shape: { rows: 5, channels: 1, taps: 1 },
    keep: 1,
    base: true,
    x: { kind: 'dense', dtype: 'F32' },
  },
  { name: 'a replaced weight', shape: CONV, keep: 0, x: { kind: 'dense', dtype: 'F32' } },
  {
    name: 'a Kronecker product',
    shape: EVEN,
    keep: 1,
    x: { kind: 'dense', dtype: 'F32', rowDiv: 8, columnDiv: 45 },
    y: [8, 45],
  },
  { name: 'a Hadamard product', shape: LINEAR, keep: 1, x: { kind: 'blocks', rank: 5 }, y: [37, 70] },
  { name: 'rows scaled', shape: CONV, keep: -0.5, x: { kind: 'dense', dtype: 'F32' }, y: [33, 1] },
  {
    name: 'columns scaled',
    shape: CONV,
    keep: 0.25,
    base: true,
    x: { kind: 'dense', dtype: 'F32' },
    y: [1, 117],
  },
  { name: 'low rank', shape: LINEAR, keep: 1, x: { kind: 'blocks', rank: 1 } },
  {
    name: 'low rank of nine taps in three blocks',
    shape: CONV,
    keep: 1,
    base: true,
    x: { kind: 'blocks', rank: 17 },
  },
  { name: 'a product', shape: LINEAR, keep: 1, x: { kind: 'product', rank: 3 } },
  { name: 'a product of nine taps', shape: CONV, keep: 1, x: { kind: 'product', rank: 8 } },
];

export const CASES: readonly Case[] = COMBINED.map((one) => ({
  name: one.name,
  kernel: combine,
  // Only blocks are read as the storage says.
  ...(one.x.kind === 'blocks' ? {} : { storages: ['f32'] as const }),
  build: (storage: Storage) => buildCombine(one, storage),
}));
