/**
 * What a kernel is: a frozen description that names its WGSL files, operands and parameters. Pure data; nothing here
 * compiles or runs. `link.ts` turns a description and its choices into one WGSL module.
 */

export type Scalar = 'u32' | 'i32' | 'f32';

/** How tensors are stored on the GPU; arithmetic is f32 either way. */
export type Storage = 'f32' | 'f16';

/** Bytes of one element of a stored tensor. */
export const storageBytes = (storage: Storage): number => (storage === 'f16' ? 2 : 4);

/**
 * What one access of a binding takes: two values, `load2_NAME(i)` and `save2_NAME(i, v)` of `vec2f` (and `load_NAME(i)`, of two
 * accesses); four; or eight, `load8_NAME(i)` and `save8_NAME(i, v)` of `array<vec4f, 2>`.
 */
export type Unit = 'pair' | 'quad' | 'octet';

export interface BindingSpec {
  /**
   * WGSL store type, e.g. `array<Quad>` (four consecutive stored values) or `array<vec4f>`. A binding of Quads is read with
   * `load_NAME(i)` and written with `save_NAME(i, v)`, whichever way its operand is stored.
   */
  readonly type: string;
  readonly access: 'read' | 'read_write';
  /** An absent optional operand leaves `HAS_name = false` and costs no binding. */
  readonly optional?: boolean;
}

/** One shape that an adapter's matrix units multiply: M x K times K x N of `input`, added in f32. */
export interface MatrixShape {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly input: Storage;
}

export interface VariantSpec {
  /** Files after the option files; the last one holds `main`. Paths below `shaders/`. */
  readonly files: readonly string[];
  readonly constants?: Readonly<Record<string, number | boolean>>;
  /** Choices that the variant is written for, of options that it does not take all of. */
  readonly choices?: Readonly<Record<string, readonly string[]>>;
  /** Bindings of Quads that it reads and writes by another unit, where that is not one Quad. */
  readonly units?: Readonly<Record<string, Unit>>;
  /** The variant relies on subgroups of exactly this many lanes. */
  readonly subgroupSize?: number;
  /** The variant multiplies with matrix units of this shape: constants MATRIX_M, MATRIX_N and MATRIX_K of its module. */
  readonly matrix?: MatrixShape;
}

export interface Kernel {
  readonly name: string;
  readonly bindings: Readonly<Record<string, BindingSpec>>;
  readonly params: Readonly<Record<string, Scalar>>;
  /** Option -> choice -> file that supplies the option's functions. */
  readonly options: Readonly<Record<string, Readonly<Record<string, string>>>>;
  /** Constants with their defaults; a dispatch may set any of them. */
  readonly constants: Readonly<Record<string, number | boolean>>;
  readonly variants: Readonly<Record<string, VariantSpec>>;
}

/** Freezes a description. `options` and `constants` may be left out. */
export function defineKernel(
  spec: Omit<Kernel, 'options' | 'constants'> & Partial<Pick<Kernel, 'options' | 'constants'>>,
): Kernel {
  return Object.freeze({ options: {}, constants: {}, ...spec });
}

/** Whether an adapter of that name runs shaders on the CPU. */
export const isSoftware = (name: string): boolean => /llvmpipe|swiftshader/i.test(name);

/** How one use of a kernel is run, among several ways that give the same result. */
export interface Choice {
  readonly variant: string;
  /** Parts that the K of a GEMM is cut into; one unless told. */
  readonly splits?: number;
}

/** By point: what was measured to be the fastest there. */
export type Choices = ReadonlyMap<string, Choice>;

/** A choice that could have been made in several ways. */
export interface Decision {
  /** What it depended on, as text: equal for uses that are alike enough to be chosen for together. */
  readonly point: string;
  /** All that the adapter runs there; the first is what the rules say. */
  readonly candidates: readonly Choice[];
}

/** What an adapter can do, as far as choosing kernels depends on it. */
export interface Capabilities {
  /** Lanes of every subgroup, or 0 where there are no subgroups or their size varies. */
  readonly subgroupSize: number;
  /** What its matrix units multiply; empty where it has none. */
  readonly matrices: readonly MatrixShape[];
  /** A driver that runs shaders on the CPU. */
  readonly software: boolean;
  readonly maxBindingBytes: number;
  readonly maxBufferBytes: number;
  readonly offsetAlignment: number;
  /** Measured on this very adapter; they win over the rules. */
  readonly tuned?: Choices | undefined;
}

/** Whether an adapter runs a variant, and without rounding what is stored as `storage`. */
export function runsOn(variant: VariantSpec, capabilities: Capabilities, storage: Storage): boolean {
  const { subgroupSize, matrix } = variant;
  if (subgroupSize && subgroupSize !== capabilities.subgroupSize) return false;
  if (!matrix) return true;
  const { m, n, k, input } = matrix;
  return (
    capabilities.subgroupSize > 0 &&
    storageBytes(input) >= storageBytes(storage) &&
    capabilities.matrices.some((o) => o.m === m && o.n === n && o.k === k && o.input === input)
  );
}

/** A tensor of the plan's arena, placed when the plan is compiled. */
export interface Virtual {
  readonly kind: 'virtual';
  readonly id: number;
  readonly label: string;
  readonly sizeBytes: number;
  /** Holds f32 whatever the storage of the plan. */
  readonly wide?: boolean;
  /** The tensor that this is a range of, from its byte `offset` on; such offsets are aligned as bindings need it. */
  readonly within?: { readonly tensor: Virtual; readonly offset: number };
}

/** A buffer with an owner outside the plan. `current` may change between runs: the plan binds it anew when it does. */
export interface Resident {
  readonly kind: 'resident';
  readonly label: string;
  readonly current: () => GPUBuffer;
  readonly offset: number;
  /** Bytes, or 0 for the whole buffer. */
  readonly sizeBytes: number;
  /** The tensor of the model that this is, from its byte `offset` on: what a run may put something else in the place of. */
  readonly tensor?: { readonly name: string; readonly offset: number };
}

export type Operand = Virtual | Resident;

/** One use of a kernel, as data. */
export interface Dispatch {
  readonly kernel: Kernel;
  readonly variant: string;
  /** Where the variant is one of several that would do. */
  readonly decision?: Decision | undefined;
  readonly choices: Readonly<Record<string, string>>;
  readonly constants: Readonly<Record<string, number | boolean>>;
  readonly operands: Readonly<Record<string, Operand>>;
  readonly params: Readonly<Record<string, number>>;
  /** Workgroups along x, y, z. */
  readonly grid: readonly [number, number, number];
  /**
   * The axis of the grid that counts images, from the param `image0` on: such a dispatch may be run in parts. Left out, all
   * images go together.
   */
  readonly imageAxis?: 1 | 2;
  readonly label: string;
  /** Multiply-adds counted as two. */
  readonly flops: number;
}

export const ceilDiv = (a: number, b: number): number => Math.ceil(a / b);

export const alignTo = (a: number, b: number): number => Math.ceil(a / b) * b;
