/**
 * A stack of changes of one tensor as dispatches: the tensor is brought to f32, each change is applied in the order of the stack,
 * and the result is packed as the plans bind it. Pure; what it is bound to is patched.ts's business.
 */
import type { Dispatch, Operand, Resident } from '../gpu/kernel.ts';
import { packOf } from '../kernels/pack.ts';
import {
  combineOf,
  type Factor,
  normsOf,
  productOf,
  rotateOf,
  unpackOf,
  type WeightShape,
  type Words,
} from '../kernels/patch.ts';
import type { Matrix } from '../unet/matmul.ts';
import { storedChannels } from '../unet/tensors.ts';
import type { Rule } from './change.ts';
import type { PlacedArray, PlacedPatch } from './placed.ts';

/** One adapter's change of a tensor; its strength is not 0. */
export interface PatchStep {
  readonly patch: PlacedPatch;
  readonly strength: number;
}

/** f32 buffers that a patching works in, each at least as large as `needOf` says. */
export interface Work<T> {
  /** The weight itself. */
  readonly weight: T;
  /** The weight with the change of a weight-decomposed adapter. */
  readonly sum: T;
  /** What a change computes on its way. */
  readonly first: T;
  readonly second: T;
  /** What a weight-decomposed adapter multiplies rows or columns by. */
  readonly scales: T;
}

/** Where a change acts: out = base + factor * delta, base being out itself where there is none. */
interface Site {
  readonly label: string;
  readonly shape: WeightShape;
  readonly work: Work<Operand>;
  readonly strength: number;
  readonly factor: number;
  readonly base: Operand | undefined;
  readonly out: Operand;
}

type Apply = (patch: PlacedPatch, site: Site) => readonly Dispatch[];

const columnsOf = ({ channels, taps }: WeightShape): number => channels * taps;

function array({ tensor, rule, arrays }: PlacedPatch, name: string): PlacedArray {
  const found = arrays[name];
  if (!found) throw new Error(`the ${rule} of ${tensor} has no array "${name}"`);
  return found;
}

const words = (patch: PlacedPatch, name: string): Words => array(patch, name);

function blocks(patch: PlacedPatch, name: string, { shape }: Site): Factor {
  const found = array(patch, name);
  if (found.kind !== 'blocks') throw new Error(`"${name}" of ${patch.tensor} is not in blocks`);
  return { ...found, paddedChannels: storedChannels(shape.channels) };
}

/** All of a weight's own shape. */
function dense(patch: PlacedPatch, name: string, { shape }: Site): Factor {
  const found = array(patch, name);
  const dtype = found.kind === 'values' ? found.dtype : 'F32';
  return { kind: 'dense', operand: found.operand, at: found.at, dtype, stride: columnsOf(shape) };
}

const worked = (operand: Operand, { shape }: Site): Factor => ({
  kind: 'dense',
  operand,
  at: 0,
  stride: columnsOf(shape),
});

const add = ({ label, shape, factor, base, out }: Site, x: Factor): Dispatch =>
  combineOf({ label, shape, keep: 1, scale: factor, x, base, out });

/** The formulas of `Rule`, by the names of arrays and sizes that `kinds/` gives them. */
const RULES: Readonly<Record<Rule, Apply>> = {
  /** delta */
  difference: (patch, site) => [add(site, dense(patch, 'delta', site))],
  /** value, whatever the strength and what was there */
  replacement: (patch, site) => {
    const { label, shape, out } = site;
    return [combineOf({ label, shape, keep: 0, scale: 1, x: dense(patch, 'value', site), out })];
  },
  /** up down */
  'low rank': (patch, site) => [add(site, blocks(patch, 'delta', site))],
  /** first o second, low rank both */
  Hadamard: (patch, site) => {
    const { label, shape, work, factor, base, out } = site;
    const y = { operand: work.first, at: 0, rows: shape.rows, columns: columnsOf(shape) };
    return [
      combineOf({ label, shape, keep: 0, scale: 1, x: blocks(patch, 'first', site), out: work.first }),
      combineOf({ label, shape, keep: 1, scale: factor, x: blocks(patch, 'second', site), y, base, out }),
    ];
  },
  /** kron(first, second) */
  Kronecker: (patch, site) => {
    const { label, shape, factor, base, out } = site;
    const { rows = 1, columns = 1, firstColumns: stride = 1 } = patch.sizes;
    const place = words(patch, 'first');
    const x: Factor = { ...place, kind: 'dense', dtype: 'F32', stride, rowDiv: rows, columnDiv: columns };
    const y = { ...words(patch, 'second'), rows, columns };
    return [combineOf({ label, shape, keep: 1, scale: factor, x, y, base, out })];
  },
  /** delta + W left right, along the input channels, or along all columns where sizes.taps is 1 */
  product: (patch, site) => {
    const { label, shape, work } = site;
    const { rank = 1, taps = 1 } = patch.sizes;
    const whole = { rows: shape.rows, channels: columnsOf(shape) / taps, taps };
    const left = words(patch, 'left');
    const right = words(patch, 'right');
    return [
      productOf({ label, shape: whole, rank, w: work.weight, left, out: work.first }),
      add(site, blocks(patch, 'delta', site)),
      add({ ...site, base: undefined }, { kind: 'product', operand: work.first, at: 0, right, rank, taps }),
    ];
  },
  /** rescale o R W - W, the butterfly's stages weighted by the strength, a single rotation's delta times it */
  rotation: (patch, site) => {
    const { label, shape, work, strength, factor, out } = site;
    const { size = 1, stages = 1, isButterfly = 0 } = patch.sizes;
    const { operand, at } = words(patch, 'rotations');
    const dispatches: Dispatch[] = [];
    let w = work.weight;
    for (let stage = 0; stage < stages; stage++) {
      const to = stage % 2 === 0 ? work.first : work.second;
      const blocks = { operand, at: at + stage * shape.rows * size };
      const halves = isButterfly ? (2 ** stage * size) / 2 : 0;
      dispatches.push(
        rotateOf({ label, shape, size, halves, mix: isButterfly ? strength : 1, w, blocks, out: to }),
      );
      w = to;
    }
    const scale = isButterfly ? factor : factor * strength;
    const y = patch.arrays.rescale && { ...words(patch, 'rescale'), rows: shape.rows, columns: 1 };
    const base = site.base;
    const x = worked(w, site);
    return [
      ...dispatches,
      combineOf({ label, shape, keep: 1 - scale, scale, x, ...(y ? { y } : {}), base, out }),
    ];
  },
};

/** One change of the weight in `work.weight`, in place. */
function apply(
  { patch, strength }: PatchStep,
  label: string,
  shape: WeightShape,
  work: Work<Operand>,
): readonly Dispatch[] {
  const { rule, scale, axis } = patch;
  const site = { label, shape, work, strength };
  // What a rotation states beside the strength bounds it, and is part of it by now.
  const plain = rule === 'rotation' ? strength : strength * scale;
  if (!axis) return RULES[rule](patch, { ...site, factor: plain, base: undefined, out: work.weight });
  const { weight, sum, scales } = work;
  const change = RULES[rule](patch, { ...site, factor: scale, base: weight, out: sum });
  const magnitude = words(patch, 'magnitude');
  const norms = normsOf({ label, shape, axis, w: axis === 'output' ? weight : sum, magnitude, out: scales });
  const size = axis === 'output' ? { rows: shape.rows, columns: 1 } : { rows: 1, columns: columnsOf(shape) };
  const decomposed = combineOf({
    label,
    shape,
    keep: 1 - strength,
    scale: strength,
    x: worked(sum, { ...site, factor: 1, base: undefined, out: weight }),
    y: { operand: scales, at: 0, ...size },
    out: weight,
  });
  return [...change, norms, decomposed];
}

export const shapeOf = ({
  outFeatures,
  inFeatures,
  kernel,
}: Pick<Matrix, 'outFeatures' | 'inFeatures' | 'kernel'>): WeightShape => ({
  rows: outFeatures,
  channels: inFeatures,
  taps: kernel ** 2,
});

/** Bytes of each work buffer that the steps need; 0 where they do without. */
export function needOf(shape: WeightShape, steps: readonly PatchStep[]): Work<number> {
  const whole = shape.rows * columnsOf(shape) * 4;
  const has = (test: (patch: PlacedPatch) => boolean): boolean => steps.some(({ patch }) => test(patch));
  const isDora = has(({ axis }) => axis !== undefined);
  const ranks = steps.map(({ patch: { rule, sizes } }) =>
    rule === 'product' ? shape.rows * (sizes.rank ?? 0) * (sizes.taps ?? 0) * 4 : 0,
  );
  return {
    weight: whole,
    sum: isDora ? whole : 0,
    first: Math.max(...ranks, has(({ rule }) => rule === 'Hadamard' || rule === 'rotation') ? whole : 0),
    second: has(({ sizes }) => (sizes.stages ?? 0) > 1) ? whole : 0,
    scales: isDora ? Math.max(shape.rows, columnsOf(shape)) * 4 : 0,
  };
}

/** A packed weight with all steps applied, into `out`, packed likewise. */
export function patchMatrix(args: {
  readonly tensor: string;
  readonly matrix: Matrix;
  readonly sizeBytes: number;
  readonly steps: readonly PatchStep[];
  readonly work: Work<Resident>;
  readonly out: Resident;
}): readonly Dispatch[] {
  const { tensor, matrix, sizeBytes, steps, work, out } = args;
  const label = `patch ${tensor}`;
  const shape = shapeOf(matrix);
  const sizes = { label, paddedChannels: storedChannels(shape.channels), format: matrix.format };
  return [
    unpackOf({ ...sizes, shape, w: matrix.range(0, sizeBytes), out: work.weight }),
    ...steps.flatMap((step) => apply(step, label, shape, work)),
    packOf({ ...sizes, ...shape, dtype: 'F32', outPanel: 0, src: work.weight, out }),
  ];
}

/** A vector of `length` values, stored as `stored` of them, with all steps applied, into `out`. Only differences and replacements. */
export function patchVector(args: {
  readonly tensor: string;
  readonly length: number;
  readonly vector: Operand;
  readonly steps: readonly PatchStep[];
  readonly out: Resident;
}): readonly Dispatch[] {
  const { tensor, length, vector, steps, out } = args;
  const label = `patch ${tensor}`;
  const shape = { rows: storedChannels(length), channels: 1, taps: 1 };
  const x: Factor = { kind: 'dense', operand: vector, at: 0, stride: 1 };
  const work = { weight: out, sum: out, first: out, second: out, scales: out };
  return [
    combineOf({ label, shape, keep: 0, scale: 1, x, out }),
    ...steps.flatMap((step) => apply(step, label, { ...shape, rows: length }, work)),
  ];
}
