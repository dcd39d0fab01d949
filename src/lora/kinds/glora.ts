/**
 * GLoRA: delta = alpha / rank * (b1 b2 + W a1 a2) with the weight W as the adapters before it left it (Chavan et al. 2023,
 * arXiv 2306.07967). A convolution multiplies along its input channels. Older LyCORIS files hold the factors the other way round,
 * delta = b2 b1 + W a2 a1, there along all columns of W as a matrix. Which of the two it is follows from the shapes, and from
 * the weight's where both fit, as in ComfyUI's weight_adapter/glora.py.
 */
import { blocksArray, type Changes, valuesArray } from '../change.ts';
import {
  columnsOf,
  type Factor,
  flattened,
  malformed,
  mismatch,
  patchChange,
  patchOf,
  type TensorFactors,
  tapsFirst,
  tapsOf,
  textOf,
} from '../factors.ts';

type Flat = Factor & { readonly rows: number; readonly columns: number };

export function glora(factors: TensorFactors): Changes {
  const { target, alpha } = factors;
  const [a1, a2, b1, b2] = (['a1', 'a2', 'b1', 'b2'] as const).map((part) => flattened(factors, part)) as [
    Flat,
    Flat,
    Flat,
    Flat,
  ];
  const isOld = isOldForm(factors, { a1, a2, b1, b2 });
  const rank = isOld ? a1.rows : a2.rows;
  const [up, down, left, right] = isOld ? [b2, b1, a2, a1] : [b1, b2, a1, a2];
  const channels = isOld ? columnsOf(factors) : target.inFeatures;
  expectSize(factors, up, [target.outFeatures, rank]);
  expectSize(factors, down, [rank, columnsOf(factors)]);
  expectSize(factors, left, [channels, rank]);
  expectSize(factors, right, [rank, channels]);
  const arrays = {
    delta: blocksArray({ rank, up: up.values, down: tapsFirst(down.values, rank, factors) }),
    left: valuesArray(left.values),
    right: valuesArray(right.values),
  };
  const scale = alpha === null ? 1 : alpha / rank;
  const sizes = { rank, taps: isOld ? 1 : tapsOf(factors) };
  return patchChange(patchOf(factors, { rule: 'product', scale, arrays, sizes, rank }));
}

function isOldForm(
  factors: TensorFactors,
  { a1, a2, b1, b2 }: { readonly a1: Factor; readonly a2: Factor; readonly b1: Factor; readonly b2: Factor },
): boolean {
  const same = (...sizes: readonly (number | undefined)[]): boolean =>
    sizes.every((size) => size === sizes[0]);
  const old = same(b2.shape[1], b1.shape[0], a1.shape[0], a2.shape[1]);
  const current = same(b2.shape[0], b1.shape[1], a1.shape[1], a2.shape[0]);
  if (!old && !current)
    malformed(
      factors,
      `a1 ${textOf(a1.shape)}, a2 ${textOf(a2.shape)}, b1 ${textOf(b1.shape)} and b2 ${textOf(b2.shape)} have no rank in common`,
    );
  const { outFeatures, inFeatures } = factors.target;
  const isSquare = a2.shape[0] === outFeatures && outFeatures === inFeatures;
  return old && (!current || isSquare);
}

function expectSize(factors: TensorFactors, factor: Flat, expected: readonly [number, number]): void {
  if (factor.rows === expected[0] && factor.columns === expected[1]) return;
  const part = [...factors.parts].find(([, { key }]) => key === factor.key)?.[0] ?? factor.key;
  mismatch(factors, part, expected, factor.shape);
}
