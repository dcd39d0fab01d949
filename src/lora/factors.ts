/**
 * The tensors of a file for one tensor of the UNet, and what all adapter kinds check and do with them. Knows shapes and
 * numbers, no keys and no files.
 */
import { UnetdError } from '../errors.ts';
import { type Part, weightShape } from '../unet/layers.ts';
import { type AdapterPatch, type Changes, type LowRank, valuesArray } from './change.ts';

/** A tensor of the file as f32, in its own layout. */
export interface Factor {
  readonly key: string;
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** A tensor as large as a weight, as the file has it. */
export interface Dense {
  readonly key: string;
  readonly shape: readonly number[];
  readonly dtype: 'F32' | 'F16' | 'BF16';
  readonly bytes: Uint8Array;
}

/** What the file holds for one tensor. */
export interface TensorFactors {
  readonly target: Part;
  readonly leaf: 'weight' | 'bias';
  /** Name of the adapter for messages. */
  readonly adapter: string;
  /** The stated alpha, or null. */
  readonly alpha: number | null;
  /** Part (as keys.ts calls it) -> tensor, without alpha. */
  readonly parts: ReadonlyMap<string, Factor>;
  readonly dense: ReadonlyMap<string, Dense>;
  /** `; this adapter was trained for SDXL, the open model is SD 1.x`, or empty. */
  readonly origin: string;
}

/**
 * The largest rank that something else than a LoRA takes as one. Terms of rank 64 in every layer cost an SD 1.5 forward 6 % of
 * its multiplications, each time; past that a patched weight, which is made once, is the cheaper way.
 */
export const MOST_RANK = 64;

export const tensorName = ({ target, leaf }: TensorFactors): string => `${target.id}.${leaf}`;

export const tapsOf = ({ target }: TensorFactors): number => target.kernel ** 2;

/** Columns of the weight as a matrix [outFeatures, columns]. */
export const columnsOf = (factors: TensorFactors): number => factors.target.inFeatures * tapsOf(factors);

/** Shape of the tensor in the model. */
export const shapeOf = ({ target, leaf }: TensorFactors): readonly number[] =>
  leaf === 'bias' ? [target.outFeatures] : weightShape(target);

export const textOf = (shape: readonly number[]): string => `[${shape.join(', ')}]`;

const product = (shape: readonly number[]): number => shape.reduce((count, size) => count * size, 1);

/** ERR_LORA_INVALID. */
export function malformed(
  { target, adapter }: TensorFactors,
  message: string,
  details: Readonly<Record<string, unknown>> = {},
): never {
  throw new UnetdError('ERR_LORA_INVALID', `Adapter "${adapter}" is malformed at ${target.id}: ${message}`, {
    adapter,
    layer: target.id,
    ...details,
  });
}

/** ERR_LORA_MISMATCH. */
export function mismatch(
  { adapter, target, origin }: TensorFactors,
  part: string,
  expected: readonly number[],
  got: readonly number[],
): never {
  const where = `Cannot bind "${part}" of adapter "${adapter}" to ${target.id}`;
  throw new UnetdError(
    'ERR_LORA_MISMATCH',
    `${where}: expected ${textOf(expected)}, got ${textOf(got)}${origin}`,
    { adapter, layer: target.id, part, expected, got },
  );
}

/** ERR_LORA_UNSUPPORTED. */
export function unsupported({ adapter, target }: TensorFactors, key: string, why: string): never {
  throw new UnetdError(
    'ERR_LORA_UNSUPPORTED',
    `Adapter "${adapter}" holds ${key} for ${target.id}, which is not applied: ${why}`,
    { adapter, key, layer: target.id },
  );
}

export function required(factors: TensorFactors, part: string): Factor {
  const factor = factors.parts.get(part);
  if (factor !== undefined) return factor;
  const there = [...factors.parts.values()].map(({ key }) => key).join(', ');
  return malformed(factors, `it has ${there}, but no matching "${part}"`, { missing: part });
}

/** A factor that must have as many dimensions as `sizes`; null there stands for any size of at least 1. */
export function sized(factors: TensorFactors, part: string, sizes: readonly (number | null)[]): Factor {
  const factor = required(factors, part);
  const { shape } = factor;
  const fits =
    shape.length === sizes.length && shape.every((size, i) => size > 0 && (sizes[i] ?? size) === size);
  if (!fits)
    mismatch(
      factors,
      part,
      sizes.map((size, i) => size ?? shape[i] ?? 1),
      shape,
    );
  return factor;
}

/** A factor as a matrix [first size, all others]; ERR_LORA_INVALID unless it has two dimensions or four, none of them 0. */
export function flattened(factors: TensorFactors, part: string): Factor & { rows: number; columns: number } {
  const factor = required(factors, part);
  const { key, shape } = factor;
  if ((shape.length !== 2 && shape.length !== 4) || shape.some((size) => size === 0))
    malformed(factors, `"${part}" (${key}) has the shape ${textOf(shape)}, not [n, m] or [n, m, k, k]`, {
      part,
      shape,
    });
  return { ...factor, rows: shape[0]!, columns: product(shape.slice(1)) };
}

/** [rank, (cin, kh, kw)], as files hold it, to [rank, (kh, kw, cin)], as the kernels read it. */
export function tapsFirst(values: Float32Array, rank: number, { target }: TensorFactors): Float32Array {
  const { inFeatures } = target;
  const taps = target.kernel ** 2;
  if (taps === 1) return values;
  const out = new Float32Array(values.length);
  for (let r = 0; r < rank; r++) {
    const base = r * inFeatures * taps;
    for (let tap = 0; tap < taps; tap++) {
      const row = base + tap * inFeatures;
      for (let c = 0; c < inFeatures; c++) out[row + c] = values[base + c * taps + tap]!;
    }
  }
  return out;
}

/** [rows, columns] -> [columns, rows]. */
export function transposed(values: Float32Array, rows: number, columns: number): Float32Array {
  const out = new Float32Array(values.length);
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) out[c * rows + r] = values[r * columns + c]!;
  return out;
}

/**
 * A Tucker core times what stands at its input side, summed in f64:
 *   out[u, tap, c] = sum_d core[u, d, tap] right[d, c], core [up, down, taps], right [down, columns].
 */
export function foldCore(
  core: Float32Array,
  right: Float32Array,
  sizes: { readonly up: number; readonly down: number; readonly taps: number; readonly columns: number },
): Float32Array {
  const { up, down, taps, columns } = sizes;
  const out = new Float32Array(up * taps * columns);
  const row = new Float64Array(columns);
  for (let u = 0; u < up; u++) {
    for (let tap = 0; tap < taps; tap++) {
      row.fill(0);
      for (let d = 0; d < down; d++) {
        const weight = core[(u * down + d) * taps + tap]!;
        for (let c = 0; c < columns; c++) row[c] = row[c]! + weight * right[d * columns + c]!;
      }
      out.set(row, (u * taps + tap) * columns);
    }
  }
  return out;
}

/**
 * The axis and values of a `dora_scale`, or undefined. ComfyUI's weight_adapter/base.py takes the output axis where its first
 * size is that of the weight, else the input axis; other shapes it cannot broadcast, or only by accident.
 */
function magnitudeOf(
  factors: TensorFactors,
): { readonly axis: 'output' | 'input'; readonly values: Float32Array } | undefined {
  const factor = factors.parts.get('dora_scale');
  if (factor === undefined) return undefined;
  const [rows = 1, channels = 1, ...kernel] = shapeOf(factors);
  const ones = kernel.map(() => 1);
  const fits = (shape: readonly number[]): boolean => textOf(shape) === textOf(factor.shape);
  if (fits([rows, 1, ...ones])) return { axis: 'output', values: factor.values };
  if (fits([1, channels, ...ones])) return { axis: 'input', values: factor.values };
  return mismatch(factors, 'dora_scale', [rows, 1, ...ones], factor.shape);
}

/** A patch by a rule, weight-decomposed where the file has a `dora_scale`. */
export function patchOf(
  factors: TensorFactors,
  patch: Pick<AdapterPatch, 'rule' | 'scale' | 'arrays' | 'rank'> & {
    readonly sizes?: AdapterPatch['sizes'];
  },
): AdapterPatch {
  const magnitude = magnitudeOf(factors);
  return {
    tensor: tensorName(factors),
    sizes: {},
    ...patch,
    ...(magnitude
      ? { axis: magnitude.axis, arrays: { ...patch.arrays, magnitude: valuesArray(magnitude.values) } }
      : {}),
  };
}

export const isDora = (factors: TensorFactors): boolean => factors.parts.has('dora_scale');

/** Terms of the layer's own matmul. */
export const lowRankChange = ({ target }: TensorFactors, scale: number, factors: LowRank): Changes => ({
  layers: [{ layer: target.id, scale, ...factors }],
  patches: [],
});

export const patchChange = (...patches: readonly AdapterPatch[]): Changes => ({ layers: [], patches });
