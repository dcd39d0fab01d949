/**
 * OFT and BOFT: rows of the weight rotated within blocks, R = (I + Q)(I - Q)^-1 with Q = B - B^T (Cayley; Qiu et al. 2023, arXiv
 * 2306.07280; Liu et al. 2023, arXiv 2311.06243). alpha bounds the norm of Q, of all blocks together. The strength s acts as
 * in ComfyUI's weight_adapter/oft.py and boft.py:
 *   OFT   W' = W + s * s (R^T - I) W, one stage; `rescale` has no effect there
 *   BOFT  W' = W + s (rescale o B_m(s) ... B_1(s) W - W), B_i(s) = s R_i + (1 - s) I between the butterfly's permutations
 */
import { type Changes, type PatchArray, valuesArray } from '../change.ts';
import {
  malformed,
  mismatch,
  patchChange,
  patchOf,
  required,
  shapeOf,
  type TensorFactors,
  textOf,
} from '../factors.ts';

export function orthogonal(factors: TensorFactors): Changes {
  const blocks = required(factors, 'oft_blocks');
  const { shape, key } = blocks;
  const isButterfly = shape.length === 4;
  const [stages = 0, count = 0, size = 0, columns = 0] = isButterfly ? shape : [1, ...shape];
  if ((shape.length !== 3 && !isButterfly) || stages * count * size === 0 || size !== columns)
    malformed(
      factors,
      `"oft_blocks" (${key}) has the shape ${textOf(shape)}, not [n, b, b] or [m, n, b, b]`,
      {
        shape,
      },
    );
  const { outFeatures } = factors.target;
  if (count * size !== outFeatures)
    mismatch(factors, 'oft_blocks', [...shape.slice(0, -3), outFeatures / size, size, size], shape);
  if (isButterfly) checkButterfly(factors, stages, size);
  const { alpha } = factors;
  const rotations = cayley(blocks.values, size, alpha ?? 0);
  // OFT multiplies by the transpose.
  if (!isButterfly) transposeBlocks(rotations, size);
  const rescale = isButterfly ? rescaleOf(factors) : undefined;
  const arrays: Record<string, PatchArray> = { rotations: valuesArray(rotations) };
  if (rescale) arrays.rescale = valuesArray(rescale);
  const sizes = { size, stages, isButterfly: isButterfly ? 1 : 0 };
  // A weight-decomposed one multiplies by alpha, the bound itself, which an OFT without alpha has as 0.
  return patchChange(patchOf(factors, { rule: 'rotation', scale: alpha ?? 0, arrays, sizes, rank: 0 }));
}

function checkButterfly(factors: TensorFactors, stages: number, size: number): void {
  const { outFeatures } = factors.target;
  const { key } = required(factors, 'oft_blocks');
  if (factors.alpha === null)
    malformed(factors, `a BOFT needs an alpha beside ${key}: ComfyUI leaves a layer without one as it is`);
  if (size % 2 !== 0 || outFeatures % (2 ** (stages - 1) * size) !== 0)
    malformed(
      factors,
      `${stages} stages of blocks of ${size} (${key}) do not divide the ${outFeatures} rows of the weight`,
    );
}

function rescaleOf(factors: TensorFactors): Float32Array | undefined {
  const rescale = factors.parts.get('rescale');
  if (rescale === undefined) return undefined;
  const [rows = 1, ...rest] = shapeOf(factors);
  const expected = [rows, ...rest.map(() => 1)];
  if (textOf(rescale.shape) !== textOf(expected)) mismatch(factors, 'rescale', expected, rescale.shape);
  return rescale.values;
}

/** (I + Q)(I - Q)^-1 = 2 (I - Q)^-1 - I of each block [size, size], in f64. */
function cayley(blocks: Float32Array, size: number, bound: number): Float32Array {
  const area = size * size;
  const q = new Float64Array(blocks.length);
  let squares = 0;
  for (let at = 0; at < q.length; at++) {
    const [i, j] = [Math.floor((at % area) / size), at % size];
    const value = blocks[at]! - blocks[at - (at % area) + j * size + i]!;
    q[at] = value;
    squares += value * value;
  }
  const norm = Math.sqrt(squares) + 1e-8;
  const shrink = bound > 0 && norm > bound ? bound / norm : 1;
  const out = new Float32Array(q.length);
  for (let start = 0; start < q.length; start += area) {
    const matrix = q
      .subarray(start, start + area)
      .map((value, at) => (at % (size + 1) === 0 ? 1 : 0) - shrink * value);
    const inverse = inverted(matrix, size);
    for (let at = 0; at < area; at++) out[start + at] = 2 * inverse[at]! - (at % (size + 1) === 0 ? 1 : 0);
  }
  return out;
}

/**
 * Gauss-Jordan in place, without pivoting: the symmetric part of I - Q is I, so every leading minor is positive and no
 * pivot falls below 1 (each is a Schur complement, whose symmetric part stays at least I).
 */
function inverted(a: Float64Array, size: number): Float64Array {
  for (let k = 0; k < size; k++) {
    const pivot = 1 / a[k * size + k]!;
    a[k * size + k] = 1;
    for (let j = 0; j < size; j++) a[k * size + j] = a[k * size + j]! * pivot;
    for (let i = 0; i < size; i++) {
      if (i === k) continue;
      const factor = a[i * size + k]!;
      if (factor === 0) continue;
      a[i * size + k] = 0;
      for (let j = 0; j < size; j++) a[i * size + j] = a[i * size + j]! - factor * a[k * size + j]!;
    }
  }
  return a;
}

function transposeBlocks(blocks: Float32Array, size: number): void {
  for (let start = 0; start < blocks.length; start += size * size)
    for (let i = 0; i < size; i++)
      for (let j = 0; j < i; j++) {
        const [low, high] = [start + i * size + j, start + j * size + i];
        [blocks[low], blocks[high]] = [blocks[high]!, blocks[low]!];
      }
}
