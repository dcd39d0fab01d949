/** What the cases of the patch kernels share: weights in the layouts of files and of the GPU, products, factors behind others. Test data. */
import { fromF32 } from '../../src/half.ts';
import type { WeightShape } from '../../src/kernels/patch.ts';
import type { Input } from './case.ts';

/** Words in front of every factor, to prove the offsets; whole quads in either storage. */
export const BEFORE: number = 8;

export const wordsInput = (bytes: Uint8Array): Input => {
  const padded = new Uint8Array(4 * BEFORE + Math.ceil(bytes.length / 4) * 4);
  padded.set(bytes, 4 * BEFORE);
  return { as: 'words', values: new Uint32Array(padded.buffer), resident: true };
};

export const behind = (values: Float32Array): Input => wordsInput(fromF32('F32', values));

export const resident = (values: Float32Array): Input => ({ as: 'f32', values, resident: true });

export const sizeOf = ({ rows, channels, taps }: WeightShape): number => rows * channels * taps;
export const padded = ({ channels }: WeightShape): number => Math.ceil(channels / 8) * 8;

/** [n][channels][taps] -> [n][taps][padded channels], as weights and down matrices lie on the GPU. */
export function tapsFirst(values: Float32Array, n: number, shape: WeightShape): Float32Array {
  const { channels, taps } = shape;
  const out = new Float32Array(n * taps * padded(shape));
  for (let row = 0; row < n; row++)
    for (let c = 0; c < channels; c++)
      for (let tap = 0; tap < taps; tap++)
        out[(row * taps + tap) * padded(shape) + c] = values[(row * channels + c) * taps + tap]!;
  return out;
}

/** `a` [rows][inner] times `b` [inner][columns]. */
export function times(
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  rows: number,
  inner: number,
  columns: number,
): Float64Array {
  const out = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++)
    for (let i = 0; i < inner; i++)
      for (let c = 0; c < columns; c++) {
        const at = r * columns + c;
        out[at] = out[at]! + a[r * inner + i]! * b[i * columns + c]!;
      }
  return out;
}

export interface Shaped {
  readonly name: string;
  readonly shape: WeightShape;
}

export const SMALL: WeightShape = { rows: 6, channels: 10, taps: 1 };
export const LINEAR: WeightShape = { rows: 37, channels: 70, taps: 1 };
export const CONV: WeightShape = { rows: 33, channels: 13, taps: 9 };
export const EVEN: WeightShape = { rows: 48, channels: 20, taps: 9 };
