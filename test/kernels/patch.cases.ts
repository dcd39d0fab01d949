/** Cases of the kernels that unpack, multiply, rotate and measure weights to patch: odd rows and channels, nine taps, both norms. */
import type { Storage } from '../../src/gpu/kernel.ts';
import {
  norms,
  normsOf,
  product,
  productOf,
  rotate,
  rotateOf,
  unpack,
  unpackOf,
} from '../../src/kernels/patch.ts';
import { type Built, type Case, random, stored, tolerance } from './case.ts';
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
} from './patch_shapes.ts';
import { quantised } from './q8_0_reference.ts';

interface Unpacked extends Shaped {
  /** Out of 8-bit blocks. */
  readonly blocks?: boolean;
}

function buildUnpack({ name, shape, blocks }: Unpacked, storage: Storage): Built {
  const { rows, channels, taps } = shape;
  const k = taps * padded(shape);
  const flat = tapsFirst(stored(random(`${name} w`, sizeOf(shape)), storage), rows, shape);
  const packed = blocks ? quantised(flat, rows, k) : undefined;
  const w = packed?.values ?? flat;
  const expected = (): Float64Array =>
    new Float64Array(sizeOf(shape)).map((_, i) => {
      const row = Math.floor(i / (channels * taps));
      return w[row * k + (i % taps) * padded(shape) + (Math.floor(i / taps) % channels)]!;
    });
  return {
    inputs: {
      w: packed
        ? { as: 'words', values: packed.words, resident: true }
        : { as: 'quad', values: panelsOf(w, rows, k, 32), resident: true },
    },
    outputs: {
      out: { as: 'f32', count: sizeOf(shape), expected, tolerance: { norm: 0, max: 0 } },
    },
    bytes: w.length * (storage === 'f16' ? 2 : 4) + sizeOf(shape) * 4,
    dispatches: ({ w, out }) => [
      unpackOf({
        label: name,
        shape,
        paddedChannels: padded(shape),
        w: w!,
        format: packed && 'q8_0',
        out: out!,
      }),
    ],
  };
}

function buildProduct({ name, shape, rank }: Shaped & { rank: number }, storage: Storage): Built {
  const { rows, channels, taps } = shape;
  const w = random(`${name} w`, sizeOf(shape));
  const left = random(`${name} left`, channels * rank);
  const expected = (): Float64Array => {
    const out = new Float64Array(rows * rank * taps);
    for (let tap = 0; tap < taps; tap++) {
      const slice = Float32Array.from({ length: rows * channels }, (_, i) => w[i * taps + tap]!);
      times(slice, left, rows, channels, rank).forEach((value, i) => {
        out[i * taps + tap] = value;
      });
    }
    return out;
  };
  return {
    inputs: { w: resident(w), left: behind(left) },
    outputs: {
      out: { as: 'f32', count: rows * rank * taps, expected, tolerance: tolerance('f32', storage, channels) },
    },
    bytes: w.length * 4,
    dispatches: (o) => [
      productOf({ label: name, shape, rank, w: o.w!, left: { operand: o.left!, at: BEFORE }, out: o.out! }),
    ],
  };
}

interface RotateShape extends Shaped {
  readonly size: number;
  readonly halves: number;
  readonly mix: number;
}

function buildRotate({ name, shape, size, halves, mix }: RotateShape, storage: Storage): Built {
  const { rows } = shape;
  const columns = shape.channels * shape.taps;
  const w = random(`${name} w`, sizeOf(shape));
  const m = random(`${name} m`, rows * size);
  // Rows as an array [whole][2][halves], its last two axes swapped: the row at place t.
  const order = Array.from({ length: rows }, (_, row) => row).sort((a, b) => place(a) - place(b));
  function place(row: number): number {
    if (halves === 0) return row;
    const whole = Math.floor(row / (2 * halves));
    const [side, half] = [Math.floor((row % (2 * halves)) / halves), row % halves];
    return (whole * halves + half) * 2 + side;
  }
  const expected = (): Float64Array => {
    const out = new Float64Array(w.length);
    order.forEach((row, t) => {
      const first = Math.floor(t / size) * size;
      for (let c = 0; c < columns; c++) {
        let sum = 0;
        for (let j = 0; j < size; j++) sum += m[t * size + j]! * w[order[first + j]! * columns + c]!;
        out[row * columns + c] = mix * sum + (1 - mix) * w[row * columns + c]!;
      }
    });
    return out;
  };
  return {
    inputs: { w: resident(w), blocks: behind(m) },
    outputs: {
      out: { as: 'f32', count: w.length, expected, tolerance: tolerance('f32', storage, size + 2) },
    },
    bytes: w.length * 8,
    dispatches: (o) => [
      rotateOf({
        label: name,
        shape,
        size,
        halves,
        mix,
        w: o.w!,
        blocks: { operand: o.blocks!, at: BEFORE },
        out: o.out!,
      }),
    ],
  };
}

function buildNorms({ name, shape, axis }: Shaped & { axis: 'output' | 'input' }, storage: Storage): Built {
  const { rows, channels, taps } = shape;
  const columns = channels * taps;
  const w = random(`${name} w`, sizeOf(shape));
  const groups = axis === 'output' ? rows : channels;
  const magnitude = random(`${name} magnitude`, groups, 0.5, 2);
  const copies = axis === 'output' ? 1 : taps;
  const expected = (): Float64Array => {
    const squares = new Float64Array(groups);
    w.forEach((value, i) => {
      const g = axis === 'output' ? Math.floor(i / columns) : Math.floor((i % columns) / taps);
      squares[g] = squares[g]! + value * value;
    });
    return Float64Array.from({ length: groups * copies }, (_, i) => {
      const g = Math.floor(i / copies);
      return magnitude[g]! / (Math.sqrt(squares[g]!) + 2 ** -23);
    });
  };
  return {
    inputs: { w: resident(w), magnitude: behind(magnitude) },
    outputs: {
      out: {
        as: 'f32',
        count: groups * copies,
        expected,
        // WGSL allows a square root and a division 2.5 units each.
        tolerance: tolerance('f32', storage, columns, 5 * 2 ** -23),
      },
    },
    bytes: w.length * 4,
    dispatches: (o) => [
      normsOf({
        label: name,
        shape,
        axis,
        w: o.w!,
        magnitude: { operand: o.magnitude!, at: BEFORE },
        out: o.out!,
      }),
    ],
  };
}

const once = ['f32'] as const satisfies readonly Storage[];

const UNPACKED: readonly Unpacked[] = [
  { name: 'one value', shape: { rows: 1, channels: 1, taps: 1 } },
  { name: 'a linear layer of two panels', shape: LINEAR },
  { name: 'nine taps', shape: { ...CONV, rows: 31 } },
  { name: 'nine taps of two panels', shape: EVEN },
  { name: 'a linear layer out of blocks', shape: { rows: 37, channels: 96, taps: 1 }, blocks: true },
  { name: 'nine taps out of blocks', shape: { rows: 33, channels: 30, taps: 9 }, blocks: true },
];

export const CASES: readonly Case[] = [
  ...UNPACKED.map((one) => ({
    name: one.name,
    kernel: unpack,
    ...(one.blocks ? { storages: ['f16'] as const } : {}),
    build: (storage: Storage) => buildUnpack(one, storage),
  })),
  ...[
    { name: 'a linear layer', shape: LINEAR, rank: 5 },
    { name: 'nine taps', shape: CONV, rank: 8 },
  ].map((one) => ({
    name: one.name,
    kernel: product,
    storages: once,
    build: (storage: Storage) => buildProduct(one, storage),
  })),
  ...[
    { name: 'blocks of neighbours', shape: EVEN, size: 6, halves: 0, mix: 0.75 },
    { name: 'an odd block', shape: { rows: 35, channels: 3, taps: 1 }, size: 5, halves: 0, mix: 1 },
    { name: 'the first butterfly', shape: EVEN, size: 4, halves: 2, mix: -0.5 },
    { name: 'a wide butterfly', shape: EVEN, size: 4, halves: 8, mix: 1.5 },
  ].map((one) => ({
    name: one.name,
    kernel: rotate,
    storages: once,
    build: (storage: Storage) => buildRotate(one, storage),
  })),
  ...(['output', 'input'] as const).flatMap((axis) =>
    [SMALL, CONV, { rows: 3, channels: 65, taps: 1 }].map((shape) => ({
      name: `${axis} axis of ${shape.rows}x${shape.channels}x${shape.taps}`,
      kernel: norms,
      storages: once,
      build: (storage: Storage) => buildNorms({ name: axis, shape, axis }, storage),
    })),
  ),
];
