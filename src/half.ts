/**
 * Number formats of tensors on the CPU: f16, bf16, fp8 and f64 to and from f32, on whole arrays, bit exact.
 * Not a tensor library: no shapes, no arithmetic. Everything is little endian, as safetensors and WebGPU are.
 */
import { UnetdError } from './errors.ts';

/** Dtypes that `toF32` reads, by their safetensors names. */
export type FloatDtype = 'F16' | 'BF16' | 'F32' | 'F64' | 'F8_E4M3' | 'F8_E5M2';

const FLOAT_DTYPES: ReadonlySet<string> = new Set(['F16', 'BF16', 'F32', 'F64', 'F8_E4M3', 'F8_E5M2']);

/** Whether `toF32` can read tensors of this dtype. */
export function isFloatDtype(dtype: string): dtype is FloatDtype {
  return FLOAT_DTYPES.has(dtype);
}

/** The f32 bits of one half (16 bits): exact, NaN payloads kept. */
function halfBits(half: number): number {
  const sign = (half & 0x8000) << 16;
  const exponent = (half >>> 10) & 0x1f;
  const mantissa = half & 0x3ff;
  if (exponent === 0x1f) return (sign | 0x7f800000 | (mantissa << 13)) >>> 0;
  if (exponent !== 0) return (sign | ((exponent + 112) << 23) | (mantissa << 13)) >>> 0;
  if (mantissa === 0) return sign >>> 0;
  // A subnormal half is mantissa * 2^-24 and a normal f32: shift the leading one out of the mantissa.
  const shift = Math.clz32(mantissa) - 21;
  return (sign | ((113 - shift) << 23) | (((mantissa << shift) & 0x3ff) << 13)) >>> 0;
}

/** F32 bits of every half: one look-up per element instead of tests for subnormals, Infinity and NaN. */
const HALF_TO_F32: Uint32Array = Uint32Array.from({ length: 0x10000 }, (_, half) => halfBits(half));

/** F32 bits of fp8 E4M3 in its "fn" form: bias 7, no infinities, NaN only as s.1111.111. */
const E4M3_TO_F32: Uint32Array = Uint32Array.from({ length: 0x100 }, (_, byte) => {
  const sign = byte & 0x80 ? -1 : 1;
  const exponent = (byte >>> 3) & 0xf;
  const mantissa = byte & 7;
  if (exponent === 0xf && mantissa === 7) return sign < 0 ? 0xffc00000 : 0x7fc00000;
  const value = exponent === 0 ? mantissa * 2 ** -9 : (1 + mantissa / 8) * 2 ** (exponent - 7);
  return new Uint32Array(new Float32Array([sign * value]).buffer)[0]!;
});

/** `source` as elements of `width` bytes; copies only where the bytes are not aligned. */
function aligned(bytes: Uint8Array, width: number): Uint8Array {
  if (bytes.byteLength % width !== 0) {
    throw new UnetdError(
      'ERR_BAD_DTYPE',
      `Expected whole elements of ${width} bytes, got ${bytes.byteLength} bytes`,
    );
  }
  // Not slice(): a Buffer's slice copies nothing.
  return bytes.byteOffset % width === 0 ? bytes : new Uint8Array(bytes);
}

function asUint16(bytes: Uint8Array): Uint16Array {
  const even = aligned(bytes, 2);
  return new Uint16Array(even.buffer, even.byteOffset, even.byteLength / 2);
}

/** Halves as f32, exact, into `out` (same length) or a new array. */
export function f16ToF32(
  halves: Uint16Array,
  out: Float32Array = new Float32Array(halves.length),
): Float32Array {
  const bits = new Uint32Array(out.buffer, out.byteOffset, out.length);
  for (let i = 0; i < halves.length; i++) bits[i] = HALF_TO_F32[halves[i]!]!;
  return out;
}

/** bfloat16 as f32, exact, into `out` (same length) or a new array. */
export function bf16ToF32(
  values: Uint16Array,
  out: Float32Array = new Float32Array(values.length),
): Float32Array {
  const bits = new Uint32Array(out.buffer, out.byteOffset, out.length);
  for (let i = 0; i < values.length; i++) bits[i] = values[i]! << 16;
  return out;
}

/** The half nearest to the f32 with these bits: ties to even, from 65520 on Infinity, NaN stays NaN (quiet). */
function roundToHalf(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x38800000) {
    if (magnitude > 0x7f800000) return sign | 0x7e00 | ((magnitude >>> 13) & 0x3ff);
    if (magnitude >= 0x47800000) return sign | 0x7c00;
    const rebased = magnitude - 0x38000000;
    return sign | ((rebased + 0xfff + ((rebased >>> 13) & 1)) >>> 13);
  }
  // Below 2^-14: multiples of 2^-24; up to 2^-25 (a tie, and zero is even) nothing remains.
  const exponent = magnitude >>> 23;
  if (exponent < 102) return sign;
  const shift = 126 - exponent;
  const mantissa = (magnitude & 0x7fffff) | 0x800000;
  const whole = mantissa >>> shift;
  const rest = mantissa & ((1 << shift) - 1);
  const tie = 1 << (shift - 1);
  return sign | (whole + (rest > tie || (rest === tie && (whole & 1) === 1) ? 1 : 0));
}

/** F32 as halves, IEEE round to nearest even, with subnormals and overflow to Infinity. */
export function f32ToF16(
  values: Float32Array,
  out: Uint16Array = new Uint16Array(values.length),
): Uint16Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  for (let i = 0; i < bits.length; i++) out[i] = roundToHalf(bits[i]!);
  return out;
}

/** F32 as bfloat16, round to nearest even; NaN stays NaN. */
export function f32ToBf16(
  values: Float32Array,
  out: Uint16Array = new Uint16Array(values.length),
): Uint16Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  for (let i = 0; i < bits.length; i++) {
    const value = bits[i]!;
    const nan = (value & 0x7fffffff) > 0x7f800000;
    out[i] = nan ? (value >>> 16) | 0x40 : (value + 0x7fff + ((value >>> 16) & 1)) >>> 16;
  }
  return out;
}

/**
 * The elements of a tensor as f32, always in memory of their own; exact but for F64, which is rounded.
 * `bytes` may be unaligned. ERR_BAD_DTYPE where `dtype` is no float dtype or the bytes are not whole elements.
 */
export function toF32(dtype: string, bytes: Uint8Array): Float32Array {
  switch (dtype) {
    case 'F32': {
      const whole = aligned(bytes, 4);
      return new Float32Array(whole.buffer, whole.byteOffset, whole.byteLength / 4).slice();
    }
    case 'F16':
      return f16ToF32(asUint16(bytes));
    case 'BF16':
      return bf16ToF32(asUint16(bytes));
    case 'F64': {
      const whole = aligned(bytes, 8);
      return Float32Array.from(new Float64Array(whole.buffer, whole.byteOffset, whole.byteLength / 8));
    }
    case 'F8_E4M3':
    case 'F8_E5M2': {
      const out = new Float32Array(bytes.length);
      const bits = new Uint32Array(out.buffer);
      // E5M2 is the upper byte of a half.
      if (dtype === 'F8_E5M2') for (let i = 0; i < bytes.length; i++) bits[i] = HALF_TO_F32[bytes[i]! << 8]!;
      else for (let i = 0; i < bytes.length; i++) bits[i] = E4M3_TO_F32[bytes[i]!]!;
      return out;
    }
    default:
      throw new UnetdError(
        'ERR_BAD_DTYPE',
        `Expected a float dtype (${[...FLOAT_DTYPES].join(', ')}), got ${dtype}`,
      );
  }
}

/** F32 elements as the bytes of a tensor of `dtype`; for F32 the result shares memory with `values`. */
export function fromF32(dtype: 'F32' | 'F16' | 'BF16', values: Float32Array): Uint8Array {
  const out = dtype === 'F32' ? values : dtype === 'F16' ? f32ToF16(values) : f32ToBf16(values);
  return new Uint8Array(out.buffer, out.byteOffset, out.byteLength);
}
