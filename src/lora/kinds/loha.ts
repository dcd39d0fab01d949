/**
 * LoHa: delta = alpha / r * (w1a w1b) o (w2a w2b), o the Hadamard product (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098).
 * With Tucker cores, m[p, c, kh, kw] = sum_i w_a[i, p] sum_j t[i, j, kh, kw] w_b[j, c]. ComfyUI: weight_adapter/loha.py.
 *
 * (u1 d1) o (u2 d2) = u d with u[o, (i, j)] = u1[o, i] u2[o, j] and d[(i, j), k] = d1[i, k] d2[j, k] (the Khatri-Rao product): a
 * plain LoRA of rank r1 r2, which is what it becomes while that is small.
 */
import { blocksArray, type Changes, type LowRank } from '../change.ts';
import {
  columnsOf,
  foldCore,
  isDora,
  lowRankChange,
  MOST_RANK,
  malformed,
  patchChange,
  patchOf,
  sized,
  type TensorFactors,
  tapsFirst,
  tapsOf,
  transposed,
} from '../factors.ts';

export function loha(factors: TensorFactors): Changes {
  const first = side(factors, 1);
  const second = side(factors, 2);
  const { alpha } = factors;
  const scale = alpha === null ? 1 : alpha / factors.parts.get('hada_w1_b')!.shape[0]!;
  const rank = Math.max(first.rank, second.rank);
  if (!isDora(factors) && first.rank * second.rank <= MOST_RANK)
    return lowRankChange(factors, scale, khatriRao(first, second));
  const arrays = { first: blocksArray(first), second: blocksArray(second) };
  return patchChange(patchOf(factors, { rule: 'Hadamard', scale, arrays, rank }));
}

/** One of the two products. */
function side(factors: TensorFactors, which: 1 | 2): LowRank {
  const { outFeatures, inFeatures, kernel } = factors.target;
  const [a, b, t] = [`hada_w${which}_a`, `hada_w${which}_b`, `hada_t${which}`] as const;
  const isTucker = factors.parts.has('hada_t1') || factors.parts.has('hada_t2');
  if (!isTucker) {
    const up = sized(factors, a, [outFeatures, null]);
    const rank = up.shape[1]!;
    const down = sized(factors, b, [rank, columnsOf(factors)]);
    return { rank, up: up.values, down: tapsFirst(down.values, rank, factors) };
  }
  if (kernel === 1 && factors.target.kind === 'linear')
    malformed(factors, `it has a Tucker core "${t}", but the layer is no convolution`);
  const up = sized(factors, a, [null, outFeatures]);
  const down = sized(factors, b, [null, inFeatures]);
  const rank = up.shape[0]!;
  const inner = down.shape[0]!;
  const core = sized(factors, t, [rank, inner, kernel, kernel]);
  const sizes = { up: rank, down: inner, taps: tapsOf(factors), columns: inFeatures };
  return {
    rank,
    up: transposed(up.values, rank, outFeatures),
    down: foldCore(core.values, down.values, sizes),
  };
}

function khatriRao(first: LowRank, second: LowRank): LowRank {
  const rank = first.rank * second.rank;
  const outs = first.up.length / first.rank;
  const columns = first.down.length / first.rank;
  const up = new Float32Array(outs * rank);
  const down = new Float32Array(rank * columns);
  for (let i = 0; i < first.rank; i++)
    for (let j = 0; j < second.rank; j++) {
      const r = i * second.rank + j;
      for (let o = 0; o < outs; o++)
        up[o * rank + r] = first.up[o * first.rank + i]! * second.up[o * second.rank + j]!;
      for (let k = 0; k < columns; k++)
        down[r * columns + k] = first.down[i * columns + k]! * second.down[j * columns + k]!;
    }
  return { rank, down, up };
}
