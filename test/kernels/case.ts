/**
 * What a kernel case is: seeded inputs, the dispatches under test and an f64 reference over the inputs as stored. The
 * shared test compares the two; the benchmark runs the same builders at real shapes. Nothing here touches a GPU.
 */
import {
  type Capabilities,
  type Dispatch,
  type Kernel,
  type Operand,
  type Storage,
  storageBytes,
} from '../../src/gpu/kernel.ts';
import { fromF32, toF32 } from '../../src/half.ts';

export const SEED: number = Number(process.env.UNETD_SEED ?? 20261124);

/** Values in the storage dtype (`quad`), in f32, or as quads that are f32 whatever the storage (`wide`). */
export type Format = 'quad' | 'f32' | 'wide';

/** An input as the kernel finds it: values in a format, or words as they are. */
export type Input =
  | { readonly as: Format; readonly values: Float32Array; readonly resident?: boolean }
  | { readonly as: 'words'; readonly values: Uint32Array; readonly resident?: boolean };

export interface Tolerance {
  /** Bound of ||out - ref|| / ||ref||. */
  readonly norm: number;
  /** Bound of max |out - ref| / max |ref|. */
  readonly max: number;
}

/** A tensor the dispatches write; one without `expected` only carries values between them. `bytes` are signed. */
export interface Output {
  readonly as: Format | 'bytes';
  readonly count: number;
  readonly expected?: () => Float64Array;
  readonly tolerance?: Tolerance;
}

export interface Built {
  readonly inputs: Readonly<Record<string, Input>>;
  readonly outputs: Readonly<Record<string, Output>>;
  readonly dispatches: (
    operands: Readonly<Record<string, Operand>>,
    capabilities: Capabilities,
    variant: string | undefined,
  ) => readonly Dispatch[];
  /** Least bytes the dispatches must move, for kernels bound by memory. */
  readonly bytes: number;
}

export interface Case {
  readonly name: string;
  /** The kernel whose variants are forced one after the other. */
  readonly kernel: Kernel;
  /** Variants that can compute this case; all when left out. */
  readonly variants?: readonly string[];
  /** Storages worth a run; both when left out. Wide tensors are what they are anyway in f32. */
  readonly storages?: readonly Storage[];
  /** What is expected of a variant, where its formula asks for a reference of its own. */
  readonly build: (storage: Storage, variant?: string) => Built;
}

/** Which tensors of a shape are f32 whatever the storage, by operand name. */
export interface Wide {
  readonly wide?: readonly string[] | undefined;
}

export const formatOf = ({ wide }: Wide, name: string): Format => (wide?.includes(name) ? 'wide' : 'quad');

/** `Case.storages` of a shape. */
export const storagesOf = ({ wide }: Wide): Pick<Case, 'storages'> => (wide ? { storages: ['f16'] } : {});

/** Uniform in [low, high), from a name and the run's seed (mulberry32 over an FNV-1a hash of the name). */
export function random(name: string, count: number, low = -1, high = 1): Float32Array {
  let state = SEED >>> 0;
  for (const char of name) state = Math.imul(state ^ char.charCodeAt(0), 0x01000193) >>> 0;
  return Float32Array.from({ length: count }, () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return low + ((high - low) * ((t ^ (t >>> 14)) >>> 0)) / 2 ** 32;
  });
}

/** The values after a round trip through their format: what the reference must work on. */
export function stored(values: Float32Array, storage: Storage, as: Format = 'quad'): Float32Array {
  return storage === 'f32' || as !== 'quad' ? values : toF32('F16', fromF32('F16', values));
}

/** Bytes of one value. */
export const bytesOf = (as: Format | 'bytes', storage: Storage): number =>
  as === 'bytes' ? 1 : as === 'quad' ? storageBytes(storage) : 4;

/** The values of an output's bytes. */
export function decoded(bytes: Uint8Array, as: Format | 'bytes', storage: Storage): Float32Array {
  if (as === 'bytes')
    return Float32Array.from(new Int8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength));
  return toF32(as === 'quad' && storage === 'f16' ? 'F16' : 'F32', bytes);
}

/** Bytes of `values` in a format. */
export function encoded(values: Float32Array, as: Format, storage: Storage): Uint8Array {
  return fromF32(as === 'quad' && storage === 'f16' ? 'F16' : 'F32', values);
}

/** Unit roundoff of f32, 2^-24. */
const U32 = 2 ** -24;

/**
 * Bounds for a result that rounds once to storage after `depth` f32 operations on values of the result's size.
 *   f32: rounding errors of a sum of `depth` terms grow like sqrt(depth) roundoffs (Higham, Accuracy and Stability,
 *     section 4.2, statistical bound); 4 of them in the norm, 16 at the worst element of a few thousand.
 *   f16: WGSL lets pack2x16float round either way, so up to one unit, 2^-10 of an element; its mean square stays
 *     below 2^-11 either way.
 *   `slack` adds what a kernel's own formula costs (exp, erf, an offset that is subtracted), argued at the case.
 */
export function tolerance(as: Format, storage: Storage, depth: number, slack = 0): Tolerance {
  const half = as === 'quad' && storage === 'f16';
  const sum = U32 * Math.sqrt(depth + 1);
  return {
    norm: (half ? 2 ** -11 : 0) + 4 * sum + slack,
    max: (half ? 2 ** -10 : 0) + 16 * sum + 4 * slack,
  };
}
