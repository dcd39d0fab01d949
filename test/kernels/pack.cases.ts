/** Cases of `pack`: every source dtype, odd rows and channels, nine taps, 8-bit blocks, a chunk with an offset. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { fromF32, toF32 } from '../../src/half.ts';
import { hasOctets, pack, packOf, quantise } from '../../src/kernels/pack.ts';
import { type Built, type Case, random, stored } from './case.ts';
import { padded, tapsFirst } from './patch_shapes.ts';
import { quantised } from './q8_0_reference.ts';

export interface PackShape {
  readonly name: string;
  readonly dtype: 'F32' | 'F16' | 'BF16';
  readonly rows: number;
  readonly channels: number;
  readonly taps: number;
  /** Largest value, 1 unless told. */
  readonly size?: number;
  /** Into 8-bit blocks. */
  readonly blocks?: boolean;
  /** Whole panels of another chunk in front. */
  readonly before?: number;
}

/** Words of the file's bytes, zero padded to whole ones. */
function wordsOf(bytes: Uint8Array): Uint32Array {
  const padded = new Uint8Array(Math.ceil(bytes.length / 4) * 4);
  padded.set(bytes);
  return new Uint32Array(padded.buffer);
}

/** The file's bytes of `rows` rows and the values they hold after storage. */
function chunkOf(shape: PackShape, what: string, rows: number, storage: Storage) {
  const { name, dtype, channels, taps, size = 1 } = shape;
  const values = random(`${name} ${what}`, rows * channels * taps, -size, size);
  // A row of zeros.
  if (shape.blocks) values.fill(0, channels * taps, 2 * channels * taps);
  const bytes = fromF32(dtype, values);
  return { bytes, values: stored(toF32(dtype, bytes), storage) };
}

const filesOf = (first: Uint8Array, last: Uint8Array): Pick<Built, 'inputs'> => ({
  inputs: {
    src: { as: 'words', values: wordsOf(last), resident: true },
    ...(first.length > 0 ? { src0: { as: 'words', values: wordsOf(first), resident: true } as const } : {}),
  },
});

const chunksOf =
  (shape: PackShape, format?: 'q8_0'): Built['dispatches'] =>
  ({ src, src0, out }, _, variant) => {
    const { name: label, dtype, rows, channels, taps, before = 0 } = shape;
    const args = { label, dtype, channels, paddedChannels: padded(shape), taps, format, out: out! };
    const chunk = packOf({ ...args, rows, src: src!, outPanel: before }, variant);
    return src0 ? [packOf({ ...args, rows: before * 32, src: src0, outPanel: 0 }, variant), chunk] : [chunk];
  };

function build(shape: PackShape, storage: Storage): Built {
  const { rows, channels, taps, before = 0 } = shape;
  const first = chunkOf(shape, 'first', before * 32, storage);
  const last = chunkOf(shape, 'last', rows, storage);
  const values = [...first.values, ...last.values];
  const paddedChannels = padded(shape);
  const k = taps * paddedChannels;
  const count = (before + Math.ceil(rows / 32)) * k * 32;
  const expected = (): Float64Array =>
    new Float64Array(count).map((_, i) => {
      const row = Math.floor(i / (k * 32)) * 32 + (i % 32);
      const at = Math.floor(i / 32) % k;
      const c = at % paddedChannels;
      const tap = Math.floor(at / paddedChannels);
      const inside = row < before * 32 + rows && c < channels;
      return inside ? values[(row * channels + c) * taps + tap]! : 0;
    });
  return {
    ...filesOf(first.bytes, last.bytes),
    outputs: {
      // The values are rounded to storage here as there; in f16 WGSL may round the other way.
      out: {
        as: 'quad',
        count,
        expected,
        tolerance: storage === 'f16' ? { norm: 2 ** -11, max: 2 ** -10 } : { norm: 0, max: 0 },
      },
    },
    bytes: last.bytes.length + count * (storage === 'f16' ? 2 : 4),
    dispatches: chunksOf(shape),
  };
}

/** Packed into 8-bit blocks, compared byte by byte. */
function buildBlocks(shape: PackShape): Built {
  const { rows, channels, taps, before = 0 } = shape;
  const first = chunkOf(shape, 'first', before * 32, 'f32');
  const last = chunkOf(shape, 'last', rows, 'f32');
  const whole = { rows: before * 32 + rows, channels, taps };
  const values = Float32Array.from([...first.values, ...last.values]);
  const k = taps * padded(whole);
  const { words } = quantised(tapsFirst(values, whole.rows, whole), whole.rows, k);
  return {
    ...filesOf(first.bytes, last.bytes),
    outputs: {
      out: {
        as: 'bytes',
        count: words.byteLength,
        expected: () => Float64Array.from(new Int8Array(words.buffer)),
        // A driver whose division is not exact may take the other neighbour of a weight half way between two.
        tolerance: { norm: 1e-4, max: 1 / 127 },
      },
    },
    bytes: last.bytes.length + words.byteLength,
    dispatches: chunksOf(shape, 'q8_0'),
  };
}

export const packCase = (shape: PackShape): Case => ({
  name: shape.name,
  kernel: shape.blocks ? quantise : pack,
  ...(hasOctets({ ...shape, format: shape.blocks ? 'q8_0' : 'f16' }) ? {} : { variants: ['words'] }),
  ...(shape.blocks ? { storages: ['f16'] } : {}),
  build: (storage) => (shape.blocks ? buildBlocks(shape) : build(shape, storage)),
});

export const CASES: readonly Case[] = [
  { name: 'one value', dtype: 'F32' as const, rows: 1, channels: 1, taps: 1 },
  ...(['F32', 'F16', 'BF16'] as const).flatMap((dtype) => [
    { name: `${dtype} with odd rows and channels`, dtype, rows: 33, channels: 13, taps: 1 },
    { name: `${dtype} with nine taps`, dtype, rows: 31, channels: 5, taps: 9 },
    { name: `${dtype} by octets`, dtype, rows: 37, channels: 40, taps: 1 },
    { name: `${dtype} of nine taps by octets`, dtype, rows: 36, channels: 40, taps: 9 },
  ]),
  { name: 'a chunk behind another', dtype: 'F16' as const, rows: 5, channels: 11, taps: 1, before: 2 },
  {
    name: 'a chunk of nine taps behind another',
    dtype: 'F32' as const,
    rows: 64,
    channels: 8,
    taps: 9,
    before: 1,
  },
  ...(['F32', 'F16', 'BF16'] as const).flatMap((dtype) => [
    { name: `${dtype} into blocks`, dtype, rows: 37, channels: 64, taps: 1, blocks: true },
    { name: `${dtype} with nine taps into blocks`, dtype, rows: 33, channels: 29, taps: 9, blocks: true },
  ]),
  {
    name: 'blocks behind others',
    dtype: 'F16' as const,
    rows: 5,
    channels: 93,
    taps: 1,
    before: 2,
    blocks: true,
  },
  {
    name: 'blocks of weights too small for a normal scale',
    dtype: 'F32' as const,
    rows: 8,
    channels: 32,
    taps: 1,
    size: 1e-4,
    blocks: true,
  },
].map(packCase);
