/**
 * What a LoRA file asks of one tensor of the UNet, as numbers: low-rank terms that the layer's own matmul adds, or a patch,
 * which needs the weight itself. Types only; algebra.ts makes them from a file, patch.ts applies patches.
 */

/** A matrix of a layer's shape as a product, delta = up down. */
export interface LowRank {
  /** Inner size of the two matrices. */
  readonly rank: number;
  /** [rank, K], K = kernel * kernel * inFeatures in the order (kh, kw, cin). */
  readonly down: Float32Array;
  /** [outFeatures, rank]. */
  readonly up: Float32Array;
}

/** y += strength * scale * up (down x), for one layer. */
export interface AdapterLayer extends LowRank {
  /** LDM layer id, as in `layersOf`. */
  readonly layer: string;
  /** alpha / rank of the file, 1 where it states no alpha. */
  readonly scale: number;
}

/** What a patch is made of: a low-rank matrix of the layer's own shape, or values as a file holds them. */
export type PatchArray =
  | ({ readonly kind: 'blocks' } & LowRank)
  | { readonly kind: 'values'; readonly dtype: 'F32' | 'F16' | 'BF16'; readonly bytes: Uint8Array };

/** How a patch changes the tensor W; patch.ts has the formula of each, with the names of its arrays and sizes. */
export type Rule =
  | 'difference'
  | 'replacement'
  | 'low rank'
  | 'Hadamard'
  | 'Kronecker'
  | 'product'
  | 'rotation';

/** A change that depends on the weight as the adapters before it left it, or has no low rank. */
export interface AdapterPatch {
  /** LDM name of the tensor, `….weight` or `….bias`. */
  readonly tensor: string;
  readonly rule: Rule;
  /** Beside the strength. */
  readonly scale: number;
  readonly arrays: Readonly<Record<string, PatchArray>>;
  readonly sizes: Readonly<Record<string, number>>;
  /** Weight-decomposed (DoRA): the axis of the array `magnitude`. */
  readonly axis?: 'output' | 'input' | undefined;
  /** The file's own, for reports; 0 where the kind has none. */
  readonly rank: number;
}

/** What one tensor of the UNet gets from a file: usually one of the two. */
export interface Changes {
  readonly layers: readonly AdapterLayer[];
  readonly patches: readonly AdapterPatch[];
}

export const valuesArray = (values: Float32Array): PatchArray => ({
  kind: 'values',
  dtype: 'F32',
  bytes: new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
});

export const blocksArray = (factors: LowRank): PatchArray => ({ kind: 'blocks', ...factors });

/** Bytes of an array as held here. */
export function arrayBytes(array: PatchArray): number {
  return array.kind === 'values' ? array.bytes.byteLength : array.down.byteLength + array.up.byteLength;
}
