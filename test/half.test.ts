/** Number formats against definitions written down a second time, over every half and chosen f32s. No GPU. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { bf16ToF32, f16ToF32, f32ToBf16, f32ToF16, fromF32, isFloatDtype, toF32 } from '../src/half.ts';

const SEED = 0x5eed;
const ALL = Uint16Array.from({ length: 0x10000 }, (_, half) => half);

/** A half's value by the definition of IEEE 754. */
function valueOfHalf(half: number): number {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const mantissa = half & 1023;
  if (exponent === 31) return mantissa === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1 + mantissa / 1024) * 2 ** (exponent - 15));
}

/** The magnitude bits of the half nearest to a finite |value| by search: ties to even, 65520 and more are Infinity. */
function nearest(magnitude: number): number {
  if (magnitude >= 65520) return 0x7c00;
  let low = 0;
  let high = 0x7c00;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (valueOfHalf(middle) <= magnitude) low = middle;
    else high = middle;
  }
  const up = high === 0x7c00 ? 65536 : valueOfHalf(high);
  const below = magnitude - valueOfHalf(low);
  const above = up - magnitude;
  return below < above || (below === above && low % 2 === 0) ? low : high;
}

function toHalf(value: number): number {
  return f32ToF16(Float32Array.of(value))[0]!;
}

describe('half precision', () => {
  it('reads every one of the 65536 halves exactly', () => {
    const values = f16ToF32(ALL);
    for (const half of ALL)
      if (!Object.is(values[half], valueOfHalf(half))) expect([half, values[half]]).toBe(valueOfHalf(half));
  });

  it('writes every half back to the same bits, and NaN as a quiet NaN', () => {
    const back = f32ToF16(f16ToF32(ALL));
    for (const half of ALL) {
      const expected = Number.isNaN(valueOfHalf(half)) ? half | 0x200 : half;
      if (back[half] !== expected) expect([half, back[half]]).toBe(expected);
    }
  });

  it('rounds the middle between any two neighbours to the even one, and its neighbours to the nearer', () => {
    const step = (value: number, by: number): number => {
      const bits = new Uint32Array(Float32Array.of(value).buffer);
      bits[0] = bits[0]! + by;
      return new Float32Array(bits.buffer)[0]!;
    };
    for (let half = 0; half < 0x7c00; half++) {
      const up = half === 0x7bff ? 65536 : valueOfHalf(half + 1);
      const middle = (valueOfHalf(half) + up) / 2;
      const even = half % 2 === 0 ? half : half + 1;
      const got = [middle, step(middle, -1), step(middle, 1), -middle].map(toHalf);
      const want = [even, half, half + 1, even | 0x8000];
      if (got.join() !== want.join()) expect([half, ...got]).toEqual([half, ...want]);
    }
  });

  it('agrees with a search over all halves for random f32 bit patterns', () => {
    fc.assert(
      fc.property(fc.float({ noNaN: true }), (value) => {
        const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
        expect(toHalf(value)).toBe(sign | nearest(Math.abs(value)));
      }),
      { seed: SEED, numRuns: 20_000 },
    );
  });

  it('overflows to Infinity from 65520 on and underflows to a signed zero at 2^-25', () => {
    const values = [
      65504,
      65519.996,
      65520,
      1e30,
      Number.NEGATIVE_INFINITY,
      2 ** -25,
      -(2 ** -25),
      2 ** -25 * 1.001,
      1e-45,
    ];
    expect(values.map(toHalf)).toEqual([0x7bff, 0x7bff, 0x7c00, 0x7c00, 0xfc00, 0, 0x8000, 1, 0]);
  });
});

describe('bfloat16', () => {
  it('goes to f32 and back without a change for every pattern that is no NaN', () => {
    const back = f32ToBf16(bf16ToF32(ALL));
    for (const bits of ALL) {
      const nan = (bits & 0x7fff) > 0x7f80;
      const expected = nan ? bits | 0x40 : bits;
      if (back[bits] !== expected) expect([bits, back[bits]]).toBe(expected);
    }
  });

  it('rounds to nearest even and overflows to Infinity', () => {
    const bits = Uint32Array.of(0x3f808000, 0x3f818000, 0x3f808001, 0x7f7fffff, 0xff7fffff, 0x7f800001);
    const out = f32ToBf16(new Float32Array(bits.buffer));
    expect([...out]).toEqual([0x3f80, 0x3f82, 0x3f81, 0x7f80, 0xff80, 0x7fc0]);
  });
});

describe('toF32', () => {
  it('reads each float dtype from unaligned bytes', () => {
    const odd = (bytes: readonly number[]): Uint8Array => Uint8Array.of(0, ...bytes).subarray(1);
    expect([...toF32('F16', odd([0, 0x3c, 0, 0xc0]))]).toEqual([1, -2]);
    expect([...toF32('BF16', odd([0x80, 0x3f, 0, 0xc0]))]).toEqual([1, -2]);
    expect([...toF32('F32', odd([0, 0, 0x80, 0x3f]))]).toEqual([1]);
    expect([...toF32('F64', odd([0, 0, 0, 0, 0, 0, 0xf0, 0x3f]))]).toEqual([1]);
    expect([...toF32('F8_E4M3', odd([0x38, 0xb8, 0x7e, 0x01, 0x7f]))]).toEqual([
      1,
      -1,
      448,
      2 ** -9,
      Number.NaN,
    ]);
    expect([...toF32('F8_E5M2', odd([0x3c, 0xbc, 0x7b, 0x01, 0x7c]))]).toEqual([
      1,
      -1,
      57344,
      2 ** -16,
      Infinity,
    ]);
  });

  it('never shares memory with its input', () => {
    const bytes = new Uint8Array(8);
    toF32('F32', bytes)[0] = 1;
    expect(bytes.every((byte) => byte === 0)).toBe(true);
  });

  it('refuses dtypes that are no floats and bytes that are no whole elements', () => {
    expect(isFloatDtype('I64')).toBe(false);
    expect(() => toF32('I64', new Uint8Array(8))).toThrow(/Expected a float dtype .* got I64/);
    for (const dtype of ['F16', 'BF16', 'F32', 'F64']) {
      expect(() => toF32(dtype, new Uint8Array(7))).toThrow(/whole elements/);
    }
  });

  it('reads what fromF32 wrote', () => {
    const values = Float32Array.of(0, -0, 1.5, -65504, Number.POSITIVE_INFINITY);
    for (const dtype of ['F32', 'F16'] as const) expect(toF32(dtype, fromF32(dtype, values))).toEqual(values);
    expect([...toF32('BF16', fromF32('BF16', Float32Array.of(1.5, -2)))]).toEqual([1.5, -2]);
  });
});
