/**
 * LoKr: delta = scale * kron(w1, w2), where w1 may be w1a w1b, and w2 w2a w2b or, with a Tucker core,
 * w2[p, r, kh, kw] = sum_i w2a[i, p] sum_j t2[i, j, kh, kw] w2b[j, r] (Yeh et al. 2023, LyCORIS, arXiv 2309.14859). The scale is
 * alpha / rank of w2b, of w1b where w2 is whole, and 1 where both are. ComfyUI: weight_adapter/lokr.py.
 *
 * kron(w1, a b) = kron(w1, a) kron(I, b) = kron(I, a) kron(w1, b), and kron(a1 b1, a2 b2) = kron(a1, a2) kron(b1, b2): plain LoRAs of
 * rank r times the smaller side of w1, or r1 r2, which is what it becomes while that is small.
 */
import { type Changes, type LowRank, valuesArray } from '../change.ts';
import {
  columnsOf,
  foldCore,
  isDora,
  lowRankChange,
  MOST_RANK,
  malformed,
  mismatch,
  patchChange,
  patchOf,
  required,
  sized,
  type TensorFactors,
  tapsFirst,
  textOf,
  transposed,
} from '../factors.ts';

/** A matrix [rows, columns], whole or as a product. */
interface Matrix {
  readonly rows: number;
  readonly columns: number;
  /** Where it is a product: [rows, rank] and [rank, columns]. */
  readonly rank?: number;
  readonly up: Float32Array;
  readonly down?: Float32Array;
  /** What alpha is divided by: the rank, at the input side of a Tucker core. */
  readonly divisor?: number;
}

export function lokr(factors: TensorFactors): Changes {
  const { alpha, target } = factors;
  const first = matrixOf(factors, 'lokr_w1');
  const second = matrixOf(factors, 'lokr_w2');
  if (
    first.rows * second.rows !== target.outFeatures ||
    first.columns * second.columns !== columnsOf(factors)
  )
    mismatch(
      factors,
      'lokr',
      [target.outFeatures, columnsOf(factors)],
      [first.rows * second.rows, first.columns * second.columns],
    );
  const divisor = second.divisor ?? first.divisor;
  const scale = alpha === null || divisor === undefined ? 1 : alpha / divisor;
  const rank = Math.max(first.rank ?? 0, second.rank ?? 0);
  const product = isDora(factors) ? undefined : asLowRank(first, second);
  if (product) {
    const down = tapsFirst(product.down, product.rank, factors);
    return lowRankChange(factors, scale, { ...product, down });
  }
  const arrays = { first: valuesArray(whole(first)), second: valuesArray(whole(second)) };
  const sizes = { firstColumns: first.columns, rows: second.rows, columns: second.columns };
  return patchChange(patchOf(factors, { rule: 'Kronecker', scale, arrays, sizes, rank }));
}

function matrixOf(factors: TensorFactors, name: 'lokr_w1' | 'lokr_w2'): Matrix {
  const { parts, target } = factors;
  const given = parts.get(name);
  const factored = parts.get(`${name}_a`) ?? parts.get(`${name}_b`);
  if (given && factored) malformed(factors, `it has both ${given.key} and ${factored.key}`);
  if (name === 'lokr_w2' && parts.has('lokr_t2')) return tucker(factors);
  if (!factored) {
    const { shape, values, key } = required(factors, name);
    const isMatrix = shape.length === 2 || (name === 'lokr_w2' && shape.length === 4);
    if (!isMatrix || shape.some((size) => size === 0))
      malformed(factors, `"${name}" (${key}) has the shape ${textOf(shape)}`, { shape });
    const square = shape.length === 2 || (shape[2] === target.kernel && shape[3] === target.kernel);
    if (!square) mismatch(factors, name, [...shape.slice(0, 2), target.kernel, target.kernel], shape);
    return { rows: shape[0]!, columns: values.length / shape[0]!, up: values };
  }
  const a = sized(factors, `${name}_a`, [null, null]);
  const b = sized(factors, `${name}_b`, [a.shape[1]!, null]);
  const [rows = 0, rank = 0] = a.shape;
  return { rows, columns: b.shape[1]!, rank, up: a.values, down: b.values, divisor: rank };
}

function tucker(factors: TensorFactors): Matrix {
  const { kernel } = factors.target;
  const a = sized(factors, 'lokr_w2_a', [null, null]);
  const b = sized(factors, 'lokr_w2_b', [null, null]);
  const [rank = 0, rows = 0] = a.shape;
  const [inner = 0, channels = 0] = b.shape;
  const core = sized(factors, 'lokr_t2', [rank, inner, kernel, kernel]);
  const taps = kernel ** 2;
  const folded = foldCore(core.values, b.values, { up: rank, down: inner, taps, columns: channels });
  // Back to the order of a file, (channel, tap), in which the Kronecker product is taken.
  const down = new Float32Array(folded.length);
  for (let r = 0; r < rank; r++)
    down.set(
      transposed(folded.subarray(r * taps * channels, (r + 1) * taps * channels), taps, channels),
      r * taps * channels,
    );
  const up = transposed(a.values, rank, rows);
  return { rows, columns: channels * taps, rank, up, down, divisor: inner };
}

/** All values, summed in f64. */
function whole({ rows, columns, rank, up, down }: Matrix): Float32Array {
  if (rank === undefined || !down) return up;
  return foldCore(up, down, { up: rows, down: rank, taps: 1, columns });
}

/** The product in low rank, down in the order of a file; undefined where its rank is above `MOST_RANK`. */
function asLowRank(first: Matrix, second: Matrix): LowRank | undefined {
  const { rank: r2, down: d2 } = second;
  if (r2 === undefined || !d2) return undefined;
  if (first.rank !== undefined && first.down && first.rank * r2 <= MOST_RANK)
    return {
      rank: first.rank * r2,
      up: kron(first.up, first.rows, first.rank, second.up, second.rows, r2),
      down: kron(first.down, first.rank, first.columns, d2, r2, second.columns),
    };
  const inner = Math.min(first.rows, first.columns);
  if (inner * r2 > MOST_RANK) return undefined;
  const w1 = whole(first);
  const byColumns = first.columns <= first.rows;
  const left = byColumns ? w1 : identity(inner);
  const right = byColumns ? identity(inner) : w1;
  return {
    rank: inner * r2,
    up: kron(left, first.rows, inner, second.up, second.rows, r2),
    down: kron(right, inner, first.columns, d2, r2, second.columns),
  };
}

function identity(size: number): Float32Array {
  const out = new Float32Array(size * size);
  for (let i = 0; i < size; i++) out[i * size + i] = 1;
  return out;
}

/** kron(a [ar, ac], b [br, bc]), [ar * br, ac * bc]. */
function kron(
  a: Float32Array,
  ar: number,
  ac: number,
  b: Float32Array,
  br: number,
  bc: number,
): Float32Array {
  const out = new Float32Array(ar * ac * br * bc);
  for (let i = 0; i < ar; i++)
    for (let j = 0; j < ac; j++) {
      const weight = a[i * ac + j]!;
      if (weight === 0) continue;
      for (let k = 0; k < br; k++)
        for (let l = 0; l < bc; l++) out[(i * br + k) * ac * bc + j * bc + l] = weight * b[k * bc + l]!;
    }
  return out;
}
