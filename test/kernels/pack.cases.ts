/** Cases of `pack`: every source dtype, odd rows and channels, nine taps, panels of 32 and 8, a chunk with an offset. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { fromF32, toF32 } from '../../src/half.ts';
import { pack, packOf } from '../../src/kernels/pack.ts';
import { type Built, type Case, random, stored } from './case.ts';

export interface PackShape {
  readonly name: string;
  readonly dtype: 'F32' | 'F16' | 'BF16';
  readonly rows: number;
  readonly channels: number;
  readonly taps: number;
  readonly width?: 8 | 32;
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
  const bytes = fromF32(shape.dtype, random(`${shape.name} ${what}`, rows * shape.channels * shape.taps));
  return { bytes, values: stored(toF32(shape.dtype, bytes), storage) };
}

function build(shape: PackShape, storage: Storage): Built {
  const { name, dtype, rows, channels, taps, width = 32, before = 0 } = shape;
  const first = chunkOf(shape, 'first', before * width, storage);
  const last = chunkOf(shape, 'last', rows, storage);
  const values = [...first.values, ...last.values];
  const paddedChannels = Math.ceil(channels / 8) * 8;
  const k = taps * paddedChannels;
  const count = (before + Math.ceil(rows / width)) * k * width;
  const expected = (): Float64Array =>
    new Float64Array(count).map((_, i) => {
      const row = Math.floor(i / (k * width)) * width + (i % width);
      const at = Math.floor(i / width) % k;
      const c = at % paddedChannels;
      const tap = Math.floor(at / paddedChannels);
      const inside = row < before * width + rows && c < channels;
      return inside ? values[(row * channels + c) * taps + tap]! : 0;
    });
  return {
    inputs: {
      src: { as: 'words', values: wordsOf(last.bytes), resident: true },
      ...(before ? { src0: { as: 'words', values: wordsOf(first.bytes), resident: true } as const } : {}),
    },
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
    dispatches: ({ src, src0, out }) => {
      const args = { label: name, dtype, channels, paddedChannels, taps, width, out: out! };
      const chunk = packOf({ ...args, rows, src: src!, outOffset: (before * k * width) / 4 });
      return src0 ? [packOf({ ...args, rows: before * width, src: src0, outOffset: 0 }), chunk] : [chunk];
    },
  };
}

export const packCase = (shape: PackShape): Case => ({
  name: shape.name,
  kernel: pack,
  build: (storage) => build(shape, storage),
});

export const CASES: readonly Case[] = [
  { name: 'one value', dtype: 'F32' as const, rows: 1, channels: 1, taps: 1 },
  ...(['F32', 'F16', 'BF16'] as const).flatMap((dtype) => [
    { name: `${dtype} with odd rows and channels`, dtype, rows: 33, channels: 13, taps: 1 },
    { name: `${dtype} with nine taps`, dtype, rows: 31, channels: 5, taps: 9 },
    { name: `${dtype} in panels of 8`, dtype, rows: 17, channels: 24, taps: 9, width: 8 as const },
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
].map(packCase);
