/** Cases of `geglu`, `from_nchw` and `to_nchw`: odd token counts, padded channels, a residual, large gates. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { f16ToF32 } from '../../src/half.ts';
import {
  copy,
  copyOf,
  fromNchw,
  fromNchwOf,
  geglu,
  gegluOf,
  toNchw,
  toNchwOf,
} from '../../src/kernels/elementwise.ts';
import { type Built, type Case, formatOf, random, storagesOf, stored, tolerance, type Wide } from './case.ts';
import { gelu } from './gemm_reference.ts';

export interface GegluShape {
  readonly name: string;
  readonly rows: number;
  readonly inner: number;
  /** Largest gate. */
  readonly gates?: number;
}

function buildGeglu({ name, rows, inner, gates = 4 }: GegluShape, storage: Storage): Built {
  const size = random(`${name} x`, rows * 2 * inner);
  const x = stored(
    size.map((v, i) => (i % (2 * inner) < inner ? v : v * gates)),
    storage,
  );
  const expected = (): Float64Array =>
    new Float64Array(rows * inner).map((_, i) => {
      const at = Math.floor(i / inner) * 2 * inner + (i % inner);
      const gate = x[at + inner]!;
      return x[at]! * gelu(gate);
    });
  return {
    inputs: { x: { as: 'quad', values: x } },
    outputs: {
      // The approximation of erf is off by up to 1.5e-7 in absolute terms.
      out: { as: 'quad', count: rows * inner, expected, tolerance: tolerance('quad', storage, 8, 1.5e-7) },
    },
    bytes: 3 * rows * inner * (storage === 'f16' ? 2 : 4),
    dispatches: (o) => [gegluOf({ label: name, rows, inner, x: o.x!, out: o.out! })],
  };
}

export const gegluCase = (shape: GegluShape): Case => ({
  name: shape.name,
  kernel: geglu,
  build: (storage) => buildGeglu(shape, storage),
});

export interface LayoutShape extends Wide {
  readonly name: string;
  readonly images: number;
  readonly tokens: number;
  readonly channels: number;
  readonly storedChannels: number;
  readonly add?: boolean;
}

function buildFrom(shape: LayoutShape, storage: Storage): Built {
  const { name, images, tokens, channels, storedChannels } = shape;
  const src = stored(random(`${name} src`, images * channels * tokens), storage);
  const count = images * tokens * storedChannels;
  const add = shape.add ? stored(random(`${name} add`, count), storage, formatOf(shape, 'add')) : undefined;
  const as = formatOf(shape, 'out');
  // The kernel reads whole quads: clients' tensors are padded to one.
  const padded = new Float32Array(Math.ceil(src.length / 4) * 4);
  padded.set(src);
  const expected = (): Float64Array =>
    new Float64Array(count).map((_, i) => {
      const c = i % storedChannels;
      const token = Math.floor(i / storedChannels) % tokens;
      const image = Math.floor(i / storedChannels / tokens);
      return (add?.[i] ?? 0) + (c < channels ? src[(image * channels + c) * tokens + token]! : 0);
    });
  return {
    inputs: {
      src: { as: 'quad', values: padded },
      ...(add ? { add: { as: formatOf(shape, 'add'), values: add } as const } : {}),
    },
    outputs: {
      out: { as, count, expected, tolerance: tolerance(as, storage, 1) },
    },
    bytes: (src.length + count) * (storage === 'f16' ? 2 : 4),
    dispatches: (o) => [
      fromNchwOf({
        ...shape,
        label: name,
        src: o.src!,
        ...(shape.add ? { add: o.add! } : {}),
        out: o.out!,
      } as Parameters<typeof fromNchwOf>[0]),
    ],
  };
}

function buildTo(shape: LayoutShape, storage: Storage): Built {
  const { name, images, tokens, channels, storedChannels } = shape;
  const x = stored(random(`${name} x`, images * tokens * storedChannels), storage, formatOf(shape, 'x'));
  const count = images * channels * tokens;
  const expected = (): Float64Array =>
    new Float64Array(count).map((_, i) => {
      const token = i % tokens;
      const c = Math.floor(i / tokens) % channels;
      const image = Math.floor(i / tokens / channels);
      return x[(image * tokens + token) * storedChannels + c]!;
    });
  return {
    inputs: { x: { as: formatOf(shape, 'x'), values: x } },
    // Values move unchanged.
    outputs: { out: { as: 'f32', count, expected, tolerance: { norm: 0, max: 0 } } },
    bytes: x.length * (storage === 'f16' ? 2 : 4) + count * 4,
    dispatches: (o) => [
      toNchwOf({ label: name, images, tokens, channels, storedChannels, x: o.x!, out: o.out! }),
    ],
  };
}

export interface CopyShape extends Wide {
  readonly name: string;
  readonly count: number;
}

function buildCopy(shape: CopyShape, storage: Storage): Built {
  const { name, count } = shape;
  const x = stored(random(`${name} x`, count), storage, formatOf(shape, 'x'));
  const as = formatOf(shape, 'out');
  const exact = { norm: 0, max: 0 };
  return {
    inputs: { x: { as: formatOf(shape, 'x'), values: x } },
    outputs: {
      out: {
        as,
        count,
        expected: () => Float64Array.from(x),
        tolerance: shape.wide?.includes('x') ? tolerance(as, storage, 1) : exact,
      },
    },
    bytes: count * 8,
    dispatches: (o) => [copyOf({ label: name, count, x: o.x!, out: o.out! })],
  };
}

const COPIES: readonly CopyShape[] = [
  { name: 'one quad', count: 4 },
  { name: 'a quad more than a row of the grid', count: 4 * (64 * 1024 + 1) },
  { name: 'wide to stored', count: 260, wide: ['x'] },
  { name: 'stored to wide', count: 260, wide: ['out'] },
];

/** Every half, what lies between it and the next one (quarters, the middle, and right beside it), and past the largest; either sign. */
function aroundHalves(): Float32Array {
  const halves = f16ToF32(Uint16Array.from({ length: 0x7c00 }, (_, half) => half));
  const values = [1e-40, 1e6, 3e38, Number.POSITIVE_INFINITY];
  for (const [at, half] of halves.entries()) {
    const step = (halves[at + 1] ?? 65536) - half;
    const middle = half + step / 2;
    values.push(
      half,
      half + step / 4,
      middle * (1 - 2 ** -23),
      middle,
      middle * (1 + 2 ** -23),
      half + (3 * step) / 4,
    );
  }
  return Float32Array.from(values.flatMap((value) => [value, -value]));
}

/** `copy` from f32 into storage: exactly what the CPU rounds to. */
const roundingCase: Case = {
  name: 'every kind of half',
  kernel: copy,
  storages: ['f16'],
  build: () => {
    const values = aroundHalves();
    const count = values.length;
    const clamped = (): Float32Array => values.map((value) => Math.max(-65504, Math.min(65504, value)));
    return {
      inputs: { x: { as: 'wide', values } },
      outputs: {
        out: {
          as: 'quad',
          count,
          expected: () => Float64Array.from(stored(clamped(), 'f16')),
          tolerance: { norm: 0, max: 0 },
        },
      },
      bytes: count * 6,
      dispatches: (o) => [copyOf({ label: 'rounding', count, x: o.x!, out: o.out! })],
    };
  },
};

const LAYOUTS: readonly LayoutShape[] = [
  { name: 'one token', images: 1, tokens: 1, channels: 4, storedChannels: 8 },
  { name: 'padded channels in two images', images: 2, tokens: 63, channels: 9, storedChannels: 16 },
  { name: 'an odd number of tokens and channels', images: 3, tokens: 65, channels: 3, storedChannels: 8 },
  { name: 'no padding', images: 2, tokens: 64, channels: 8, storedChannels: 8 },
];

export const CASES: readonly Case[] = [
  ...[
    { name: 'one row', rows: 1, inner: 4 },
    { name: 'rows and columns past the workgroup', rows: 5, inner: 68 },
    { name: 'large gates', rows: 3, inner: 64, gates: 40 },
    { name: 'a prime number of rows', rows: 37, inner: 160 },
  ].map(gegluCase),
  ...[
    ...LAYOUTS,
    { ...LAYOUTS[2]!, name: 'a wide residual', add: true, wide: ['add', 'out'] },
    ...LAYOUTS.map((l) => ({ ...l, name: `${l.name} with a residual`, add: true })),
  ].map(
    (shape): Case => ({
      name: shape.name,
      kernel: fromNchw,
      ...storagesOf(shape),
      build: (storage) => buildFrom(shape, storage),
    }),
  ),
  ...COPIES.map(
    (shape): Case => ({
      name: shape.name,
      kernel: copy,
      ...storagesOf(shape),
      build: (storage) => buildCopy(shape, storage),
    }),
  ),
  roundingCase,
  ...[...LAYOUTS, { ...LAYOUTS[1]!, name: 'wide pixels', wide: ['x'] }].map(
    (shape): Case => ({
      name: shape.name,
      kernel: toNchw,
      ...storagesOf(shape),
      build: (storage) => buildTo(shape, storage),
    }),
  ),
];
