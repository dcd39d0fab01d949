/**
 * From the tensors that a file holds for one layer to its low-rank form: one row per adapter kind. A kind that is known
 * and not in `ALGEBRA` is refused by the parser. Knows shapes and numbers, no keys and no files.
 */
import { UnetdError } from '../errors.ts';
import type { Layer } from '../unet/config.ts';
import type { AdapterKind } from './keys.ts';

/** y += strength * scale * up (down x), for one layer. */
export interface AdapterLayer {
  /** LDM layer id, as in `layersOf`. */
  readonly layer: string;
  /** Inner size of the two matrices. */
  readonly rank: number;
  /** alpha / rank of the file, 1 where it states no alpha. */
  readonly scale: number;
  /** [rank, K], K = kernel * kernel * inFeatures in the order (kh, kw, cin). */
  readonly down: Float32Array;
  /** [outFeatures, rank]. */
  readonly up: Float32Array;
}

/** A tensor of the file as f32, in its own layout. */
export interface Factor {
  readonly key: string;
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** What the file holds for one layer. */
export interface LayerFactors {
  readonly layer: Layer;
  /** Name of the adapter for messages. */
  readonly adapter: string;
  /** The stated alpha, or null. */
  readonly alpha: number | null;
  /** Part (as keys.ts calls it) -> tensor, without alpha. */
  readonly parts: ReadonlyMap<string, Factor>;
  /** `; this adapter was trained for SDXL, the open model is SD 1.x`, or empty. */
  readonly origin: string;
}

/** One row per kind. New kinds: give keys.ts their endings part by part, and add a function here. */
export const ALGEBRA: ReadonlyMap<AdapterKind, (factors: LayerFactors) => AdapterLayer> = new Map([
  ['LoRA', lowRank],
]);

function text(shape: readonly number[]): string {
  return `[${shape.join(', ')}]`;
}

function malformed(
  { layer, adapter }: LayerFactors,
  message: string,
  details: Readonly<Record<string, unknown>>,
): never {
  throw new UnetdError('ERR_LORA_INVALID', `Adapter "${adapter}" is malformed at ${layer.id}: ${message}`, {
    adapter,
    layer: layer.id,
    ...details,
  });
}

function mismatch(
  factors: LayerFactors,
  part: string,
  expected: readonly number[],
  got: readonly number[],
): never {
  const { adapter, layer, origin } = factors;
  const where = `Cannot bind "${part}" of adapter "${adapter}" to ${layer.id}`;
  throw new UnetdError(
    'ERR_LORA_MISMATCH',
    `${where}: expected ${text(expected)}, got ${text(got)}${origin}`,
    {
      adapter,
      layer: layer.id,
      part,
      expected,
      got,
    },
  );
}

function required(factors: LayerFactors, part: string): Factor {
  const factor = factors.parts.get(part);
  if (factor !== undefined) return factor;
  const there = [...factors.parts.values()].map(({ key }) => key).join(', ');
  return malformed(factors, `it has ${there}, but no matching "${part}"`, { missing: part });
}

/** Checks that a matrix is [rows, columns] or [rows, columns, k, k] with no size of 0. */
function checkMatrix(factors: LayerFactors, part: string, { key, shape }: Factor): void {
  const square = shape.length === 2 || (shape.length === 4 && shape[2] === shape[3]);
  if (square && shape.every((size) => size > 0)) return;
  malformed(factors, `"${part}" (${key}) has the shape ${text(shape)}, not [n, m] or [n, m, k, k]`, {
    part,
    shape,
  });
}

/**
 * LoRA and LoCon: delta = alpha / rank * up down, where down is a linear layer or the layer's convolution with `rank`
 * outputs, and up is linear or 1x1. Linear matrices may be written as 1x1 convolutions and the other way round.
 *
 * With a Tucker core `mid` [r_up, r_down, kh, kw] between a 1x1 down [r_down, cin] and up [out, r_up],
 *   delta[o, c, kh, kw] = sum_u up[o, u] sum_d mid[u, d, kh, kw] down[d, c],
 * so folding it gives a plain LoRA of rank r_up: down'[u, kh, kw, c] = sum_d mid[u, d, kh, kw] down[d, c].
 * The scale stays alpha / r_down, as ComfyUI's weight_adapter/lora.py has it.
 */
function lowRank(factors: LayerFactors): AdapterLayer {
  const { layer, alpha } = factors;
  const down = required(factors, 'down');
  const up = required(factors, 'up');
  const mid = factors.parts.get('mid');
  checkMatrix(factors, 'down', down);
  checkMatrix(factors, 'up', up);
  const downRank = down.shape[0]!;
  const rank = mid === undefined ? downRank : midRank(factors, mid, downRank);
  if (up.shape.length === 4 && up.shape[2] !== 1) {
    malformed(factors, `"up" (${up.key}) is a ${up.shape[2]}x${up.shape[2]} convolution, only 1x1 is known`, {
      shape: up.shape,
    });
  }
  if (up.shape[1] !== rank) {
    const inner = mid === undefined ? 'down' : 'mid';
    malformed(factors, `"up" ${text(up.shape)} takes rank ${up.shape[1]}, "${inner}" gives rank ${rank}`, {
      shape: up.shape,
    });
  }
  if (up.shape[0] !== layer.outFeatures) {
    mismatch(factors, 'up', [layer.outFeatures, rank, ...up.shape.slice(2)], up.shape);
  }
  const matrix = mid === undefined ? downMatrix(factors, down) : foldMid(factors, down, mid);
  return { layer: layer.id, rank, scale: alpha === null ? 1 : alpha / downRank, down: matrix, up: up.values };
}

/** `down` as [rank, (kh, kw, cin)]. A file holds [rank, cin, kh, kw], or that flattened to two dimensions. */
function downMatrix(factors: LayerFactors, down: Factor): Float32Array {
  const { inFeatures, kernel, kind } = factors.layer;
  const { shape, values } = down;
  const rank = shape[0]!;
  const taps = kernel * kernel;
  const fits =
    shape.length === 2 ? shape[1] === inFeatures * taps : shape[1] === inFeatures && shape[2] === kernel;
  if (!fits) {
    const expected = kind === 'linear' || (kernel === 1 && shape.length === 2) ? [] : [kernel, kernel];
    mismatch(factors, 'down', [rank, inFeatures, ...expected], shape);
  }
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

/** r_up of a Tucker core [r_up, r_down, k, k]. */
function midRank(factors: LayerFactors, { key, shape }: Factor, downRank: number): number {
  if (shape.length !== 4 || shape[2] !== shape[3] || shape.some((size) => size === 0)) {
    malformed(factors, `"mid" (${key}) has the shape ${text(shape)}, not [r, r, k, k]`, {
      part: 'mid',
      shape,
    });
  }
  if (shape[1] !== downRank) {
    malformed(factors, `"mid" ${text(shape)} takes rank ${shape[1]}, "down" gives rank ${downRank}`, {
      shape,
    });
  }
  return shape[0]!;
}

/** down'[u, (kh, kw, c)] = sum_d mid[u, d, kh, kw] down[d, c], summed in f64. */
function foldMid(factors: LayerFactors, down: Factor, mid: Factor): Float32Array {
  const { inFeatures, kernel } = factors.layer;
  const [upRank, downRank, midKernel] = mid.shape as readonly [number, number, number, number];
  if (down.shape[1] !== inFeatures || (down.shape[2] ?? 1) !== 1) {
    mismatch(factors, 'down', [downRank, inFeatures, 1, 1], down.shape);
  }
  if (midKernel !== kernel) mismatch(factors, 'mid', [upRank, downRank, kernel, kernel], mid.shape);
  const taps = kernel * kernel;
  const out = new Float32Array(upRank * taps * inFeatures);
  const row = new Float64Array(inFeatures);
  for (let u = 0; u < upRank; u++) {
    for (let tap = 0; tap < taps; tap++) {
      row.fill(0);
      for (let d = 0; d < downRank; d++) {
        const weight = mid.values[(u * downRank + d) * taps + tap]!;
        for (let c = 0; c < inFeatures; c++) row[c] = row[c]! + weight * down.values[d * inFeatures + c]!;
      }
      out.set(row, (u * taps + tap) * inFeatures);
    }
  }
  return out;
}
