/** Cases of `attention`: head widths of SD 1.5, SD 2, SDXL and odd ones; few and many keys; logits far from zero. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { attention, attentionOf } from '../../src/kernels/attention.ts';
import { type Built, type Case, random, stored, tolerance } from './case.ts';

export interface AttentionShape {
  readonly name: string;
  readonly images?: number;
  readonly heads: number;
  readonly headDim: number;
  readonly queries: number;
  readonly keys: number;
  /** Size of the largest scaled score. */
  readonly logits?: number;
}

interface Data {
  readonly q: Float32Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
}

/** softmax over the keys of one query and head, in f64 with the usual shift by the largest score. */
function weightsOf(scores: Float64Array): Float64Array {
  const top = scores.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const e = scores.map((score) => Math.exp(score - top));
  const total = e.reduce((a, b) => a + b, 0);
  return e.map((value) => value / total);
}

function reference(shape: AttentionShape, { q, k, v }: Data): Float64Array {
  const { heads, headDim, queries, keys } = shape;
  const width = heads * headDim;
  const out = new Float64Array(q.length);
  for (let row = 0; row < q.length / width; row++) {
    const image = Math.floor(row / queries);
    for (let h = 0; h < heads; h++) {
      const qAt = row * width + h * headDim;
      const kAt = (j: number): number => (image * keys + j) * width + h * headDim;
      const scores = new Float64Array(keys).map((_, j) => {
        let dot = 0;
        for (let d = 0; d < headDim; d++) dot += q[qAt + d]! * k[kAt(j) + d]!;
        return dot / Math.sqrt(headDim);
      });
      weightsOf(scores).forEach((weight, j) => {
        for (let d = 0; d < headDim; d++) out[qAt + d]! += weight * v[kAt(j) + d]!;
      });
    }
  }
  return out;
}

function build(shape: AttentionShape, storage: Storage): Built {
  const { name, heads, headDim, queries, keys, logits = 4 } = shape;
  const images = shape.images ?? 1;
  const width = heads * headDim;
  // A dot of headDim products of uniforms of size s has deviation s^2/3 * sqrt(headDim); 3 deviations reach `logits`.
  const size = Math.sqrt(logits);
  const data: Data = {
    q: stored(random(`${name} q`, images * queries * width, -size, size), storage),
    k: stored(random(`${name} k`, images * keys * width, -size, size), storage),
    v: stored(random(`${name} v`, images * keys * width), storage),
  };
  // A score of size L carries L roundoffs of its own sum, WGSL's exp 3 + 2 L units more: both become relative errors
  // of a weight.
  const slack = 2 ** -24 * (3 + 3 * logits);
  return {
    inputs: {
      q: { as: 'quad', values: data.q },
      k: { as: 'quad', values: data.k },
      v: { as: 'quad', values: data.v },
    },
    outputs: {
      out: {
        as: 'quad',
        count: data.q.length,
        expected: () => reference({ ...shape, images }, data),
        tolerance: tolerance('quad', storage, keys + headDim, slack),
      },
    },
    bytes: 2 * (data.q.length + data.k.length) * (storage === 'f16' ? 2 : 4),
    dispatches: ({ q, k, v, out }, capabilities, variant) => [
      attentionOf(
        { label: name, images, heads, headDim, queries, keys, storage, q: q!, k: k!, v: v!, out: out! },
        capabilities,
        variant,
      ),
    ],
  };
}

/** Variants that take a head width; all when nothing is said. */
const variantsOf = (headDim: number): Pick<Case, 'variants'> => (headDim % 4 ? { variants: ['scalar'] } : {});

export const attentionCase = (shape: AttentionShape): Case => ({
  name: shape.name,
  kernel: attention,
  ...variantsOf(shape.headDim),
  build: (storage) => build(shape, storage),
});

/** Fewest heads whose rows fill whole quads, so that no width is left out; two more than that where one would do. */
const headsOf = (headDim: number): number => (headDim % 2 ? 4 : headDim % 4 ? 2 : 3);

const WIDTHS = [40, 64, 80, 160, 4, 8, 28, 48, 5, 6, 3];
const KEYS = [1, 31, 32, 33, 77];

export const CASES: readonly Case[] = [
  ...WIDTHS.map((headDim) => ({
    name: `heads ${headDim} wide`,
    images: 2,
    heads: headsOf(headDim),
    headDim,
    queries: 19,
    keys: 45,
  })),
  ...KEYS.map((keys) => ({ name: `${keys} keys`, images: 2, heads: 2, headDim: 8, queries: 33, keys })),
  ...[1, 7, 8, 31, 32, 63, 64, 65].map((queries) => ({
    name: `${queries} ${queries === 1 ? 'query' : 'queries'}`,
    heads: 1,
    headDim: 8,
    queries,
    keys: 40,
  })),
  { name: 'scores up to 60 and more', heads: 2, headDim: 40, queries: 33, keys: 130, logits: 60 },
  { name: 'scores up to 60 in heads 8 wide', heads: 1, headDim: 8, queries: 65, keys: 77, logits: 60 },
  {
    name: 'scores up to 60 in heads 5 wide',
    images: 2,
    heads: 4,
    headDim: 5,
    queries: 9,
    keys: 65,
    logits: 60,
  },
  { name: 'eight heads 3 wide', heads: 8, headDim: 3, queries: 5, keys: 6 },
].map(attentionCase);
