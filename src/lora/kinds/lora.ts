/**
 * LoRA and LoCon: delta = alpha / rank * up down, where down is a linear layer or the layer's convolution with `rank`
 * outputs, and up is linear or 1x1. Linear matrices may be written as 1x1 convolutions and the other way round.
 * ComfyUI: weight_adapter/lora.py.
 */
import type { AdapterPatch, Changes } from '../change.ts';
import { blocksArray, valuesArray } from '../change.ts';
import {
  type Factor,
  foldCore,
  isDora,
  lowRankChange,
  malformed,
  mismatch,
  patchChange,
  patchOf,
  required,
  shapeOf,
  type TensorFactors,
  tapsFirst,
  textOf,
  unsupported,
} from '../factors.ts';

/**
 * With a Tucker core `mid` [r_up, r_down, kh, kw] between a 1x1 down [r_down, cin] and up [out, r_up],
 *   delta[o, c, kh, kw] = sum_u up[o, u] sum_d mid[u, d, kh, kw] down[d, c],
 * so folding it gives a plain LoRA of rank r_up: down'[u, kh, kw, c] = sum_d mid[u, d, kh, kw] down[d, c].
 * The scale stays alpha / r_down, as ComfyUI has it.
 */
export function lora(factors: TensorFactors): Changes {
  const { target, alpha } = factors;
  const down = required(factors, 'down');
  const up = required(factors, 'up');
  const mid = factors.parts.get('mid');
  checkMatrix(factors, 'down', down);
  checkMatrix(factors, 'up', up);
  checkReshape(factors);
  const downRank = down.shape[0]!;
  const rank = mid === undefined ? downRank : midRank(factors, mid, downRank);
  if (up.shape.length === 4 && up.shape[2] !== 1) {
    malformed(factors, `"up" (${up.key}) is a ${up.shape[2]}x${up.shape[2]} convolution, only 1x1 is known`, {
      shape: up.shape,
    });
  }
  if (up.shape[1] !== rank) {
    const inner = mid === undefined ? 'down' : 'mid';
    malformed(factors, `"up" ${textOf(up.shape)} takes rank ${up.shape[1]}, "${inner}" gives rank ${rank}`, {
      shape: up.shape,
    });
  }
  if (up.shape[0] !== target.outFeatures) {
    mismatch(factors, 'up', [target.outFeatures, rank, ...up.shape.slice(2)], up.shape);
  }
  const matrix = mid === undefined ? downMatrix(factors, down) : foldMid(factors, down, mid);
  const scale = alpha === null ? 1 : alpha / downRank;
  const product = { rank, down: matrix, up: up.values };
  const bias = biasPatch(factors, scale);
  if (!isDora(factors)) return { ...lowRankChange(factors, scale, product), patches: bias };
  const arrays = { delta: blocksArray(product) };
  return patchChange(patchOf(factors, { rule: 'low rank', scale, arrays, rank }), ...bias);
}

/** Checks that a matrix is [rows, columns] or [rows, columns, k, k] with no size of 0. */
function checkMatrix(factors: TensorFactors, part: string, { key, shape }: Factor): void {
  const square = shape.length === 2 || (shape.length === 4 && shape[2] === shape[3]);
  if (square && shape.every((size) => size > 0)) return;
  malformed(factors, `"${part}" (${key}) has the shape ${textOf(shape)}, not [n, m] or [n, m, k, k]`, {
    part,
    shape,
  });
}

/** `down` as [rank, (kh, kw, cin)]. A file holds [rank, cin, kh, kw], or that flattened to two dimensions. */
function downMatrix(factors: TensorFactors, down: Factor): Float32Array {
  const { inFeatures, kernel, kind } = factors.target;
  const { shape, values } = down;
  const rank = shape[0]!;
  const fits =
    shape.length === 2
      ? shape[1] === inFeatures * kernel ** 2
      : shape[1] === inFeatures && shape[2] === kernel;
  if (!fits) {
    const expected = kind === 'linear' || (kernel === 1 && shape.length === 2) ? [] : [kernel, kernel];
    mismatch(factors, 'down', [rank, inFeatures, ...expected], shape);
  }
  return tapsFirst(values, rank, factors);
}

/** r_up of a Tucker core [r_up, r_down, k, k]. */
function midRank(factors: TensorFactors, { key, shape }: Factor, downRank: number): number {
  if (shape.length !== 4 || shape[2] !== shape[3] || shape.some((size) => size === 0)) {
    malformed(factors, `"mid" (${key}) has the shape ${textOf(shape)}, not [r, r, k, k]`, {
      part: 'mid',
      shape,
    });
  }
  if (shape[1] !== downRank) {
    malformed(factors, `"mid" ${textOf(shape)} takes rank ${shape[1]}, "down" gives rank ${downRank}`, {
      shape,
    });
  }
  return shape[0]!;
}

function foldMid(factors: TensorFactors, down: Factor, mid: Factor): Float32Array {
  const { inFeatures, kernel } = factors.target;
  const [upRank, downRank, midKernel] = mid.shape as readonly [number, number, number, number];
  if (down.shape[1] !== inFeatures || (down.shape[2] ?? 1) !== 1) {
    mismatch(factors, 'down', [downRank, inFeatures, 1, 1], down.shape);
  }
  if (midKernel !== kernel) mismatch(factors, 'mid', [upRank, downRank, kernel, kernel], mid.shape);
  return foldCore(mid.values, down.values, {
    up: upRank,
    down: downRank,
    taps: kernel ** 2,
    columns: inFeatures,
  });
}

/** `reshape_weight` pads the weight to another shape; a UNet runs with its own shapes only. */
function checkReshape(factors: TensorFactors): void {
  const reshape = factors.parts.get('reshape_weight');
  if (reshape === undefined || textOf([...reshape.values]) === textOf(shapeOf(factors))) return;
  unsupported(
    factors,
    reshape.key,
    `it pads the weight from ${textOf(shapeOf(factors))} to ${textOf([...reshape.values])}, and the open model runs with its own shape`,
  );
}

/** The bias that PEFT can give the up projection (`lora_bias`): bias += strength * scale * b (peft/tuners/lora/layer.py). */
function biasPatch(factors: TensorFactors, scale: number): readonly AdapterPatch[] {
  const bias = factors.parts.get('up_bias');
  if (bias === undefined) return [];
  const { id, outFeatures, bias: hasBias } = factors.target;
  if (!hasBias) unsupported(factors, bias.key, 'the layer has no bias');
  if (textOf(bias.shape) !== textOf([outFeatures])) mismatch(factors, 'up_bias', [outFeatures], bias.shape);
  const arrays = { delta: valuesArray(bias.values) };
  return [{ tensor: `${id}.bias`, rule: 'difference', scale, arrays, sizes: {}, rank: 0 }];
}
