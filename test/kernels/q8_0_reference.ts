/** Weights in blocks of 8-bit numbers, written the naive way from the formula: the oracle of the cases that read or write them. */
import { f16ToF32, f32ToF16 } from '../../src/half.ts';

export interface Quantised {
  /** [n][k] as they are read back. */
  readonly values: Float32Array;
  /** As the kernels find them: see `shaders/lib/w_q8_0.wgsl`. */
  readonly words: Uint32Array;
}

const roundToEven = (v: number): number => {
  const low = Math.floor(v);
  const above = v - low;
  return above > 0.5 || (above === 0.5 && low % 2 !== 0) ? low + 1 : low;
};

/** w [n][k], k a multiple of 32: 32 weights of a row along k share d = max / 127 as a half, each is the nearest multiple of it. */
export function quantised(w: ArrayLike<number>, n: number, k: number): Quantised {
  const blocks = Math.ceil(n / 32) * (k / 32);
  const values = new Float32Array(n * k);
  const bytes = new Uint8Array(blocks * 1088);
  const halves = new Uint16Array(bytes.buffer);
  for (let row = 0; row < n; row++)
    for (let k0 = 0; k0 < k; k0 += 32) {
      const all = Array.from({ length: 32 }, (_, i) => w[row * k + k0 + i]!);
      const [half = 0] = f32ToF16(Float32Array.of(Math.fround(Math.max(...all.map(Math.abs)) / 127)));
      const [d = 0] = f16ToF32(Uint16Array.of(half));
      const block = Math.floor(row / 32) * (k / 32) + k0 / 32;
      const q = Math.floor((row % 32) / 4);
      halves[block * 544 + 512 + 4 * q + (row % 4)] = half;
      all.forEach((value, i) => {
        const steps = d > 0 ? Math.max(-127, Math.min(127, roundToEven(Math.fround(value / d)))) : 0;
        values[row * k + k0 + i] = steps * d;
        bytes[block * 1088 + (Math.floor(i / 4) * 8 + q) * 16 + (i % 4) * 4 + (row % 4)] = steps;
      });
    }
  return { values, words: new Uint32Array(bytes.buffer) };
}
