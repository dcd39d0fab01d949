/** Multi-head attention that never stores the scores. Formulas and layouts stand in `shaders/attention/`. */
import {
  type Capabilities,
  ceilDiv,
  type Dispatch,
  defineKernel,
  type Kernel,
  type MatrixShape,
  type Operand,
  type Storage,
  storageBytes,
} from '../gpu/kernel.ts';
import { lanesOf, matrixVariants } from './matrix.ts';
import { pick } from './pick.ts';

export const attention: Kernel = defineKernel({
  name: 'attention',
  bindings: {
    q: { type: 'array<Quad>', access: 'read_write' },
    k: { type: 'array<Quad>', access: 'read_write' },
    v: { type: 'array<Quad>', access: 'read_write' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: { queries: 'u32', keys: 'u32', rowQuads: 'u32', scale: 'f32' },
  constants: { HEAD_DIM: 0, HEAD_QUADS: 0, TILE_KEYS: 0, GROUPS: 1, LANES: 32 },
  variants: {
    broadcast: { files: ['attention/broadcast.wgsl'], subgroupSize: 8 },
    direct: { files: ['attention/direct.wgsl'] },
    scalar: { files: ['attention/scalar.wgsl'] },
    ...matrixVariants(['attention/sgm_rows.wgsl', 'attention/sgm.wgsl']),
  },
});

export interface AttentionArgs {
  readonly label: string;
  readonly images: number;
  readonly heads: number;
  readonly headDim: number;
  readonly queries: number;
  readonly keys: number;
  /** Of q, k and v; f32 unless told. */
  readonly storage?: Storage;
  /** q, out [images, queries, heads * headDim]; k, v [images, keys, heads * headDim]. */
  readonly q: Operand;
  readonly k: Operand;
  readonly v: Operand;
  readonly out: Operand;
}

/**
 * Keys of a tile of the `broadcast` variant: as many as keep it within 40 quads; twice as many of halves, whose loads take half
 * the code, where that is within 64. 0 where no tile of whole loads exists: widths whose quads are odd and many.
 */
function tileKeys(headDim: number, storage: Storage): number {
  const quads = headDim / 4;
  const keys = [8, 4, 2, 1].find((count) => count * quads <= 40 && (count * quads) % 8 === 0) ?? 0;
  return storage === 'f16' && keys < 8 && 2 * keys * quads <= 64 ? 2 * keys : keys;
}

/** Queries of a workgroup, or of a group of them. */
const queriesOf = (variant: string): number => (variant === 'broadcast' ? 32 : 64);

/**
 * Groups of queries of a workgroup: two of `broadcast`, which share what is loaded of keys and values, where that pays and leaves none
 * empty. With tiles of four keys and 40 quads or more it takes 3 to 10 % less time, with smaller ones up to 25 % more.
 */
function groupsOf(variant: string, headDim: number, storage: Storage, queries: number): 1 | 2 {
  const keys = tileKeys(headDim, storage);
  const pays = variant === 'broadcast' && keys >= 4 && (keys * headDim) / 4 >= 40;
  return pays && ceilDiv(queries, queriesOf(variant)) % 2 === 0 ? 2 : 1;
}

/** Keys of a tile for matrix units: as many as leave all that lies in workgroup memory within 16 KiB. */
const matrixKeys = (headDim: number, { input }: MatrixShape): number =>
  headDim * storageBytes(input) <= 160 ? 32 : 16;

function constantsOf(
  headDim: number,
  storage: Storage,
  groups: number,
  variant: string,
  capabilities: Capabilities,
): Dispatch['constants'] {
  if (variant === 'scalar') return { HEAD_DIM: headDim };
  const HEAD_QUADS = headDim / 4;
  if (variant === 'broadcast') return { HEAD_QUADS, TILE_KEYS: tileKeys(headDim, storage), GROUPS: groups };
  const spec = attention.variants[variant];
  if (!spec?.matrix) return { HEAD_QUADS };
  return { HEAD_QUADS, TILE_KEYS: matrixKeys(headDim, spec.matrix), ...lanesOf(spec, capabilities) };
}

export function attentionOf(args: AttentionArgs, capabilities: Capabilities, variant?: string): Dispatch {
  const { images, heads, headDim, queries, keys, q, k, v, out } = args;
  const format = args.storage ?? 'f32';
  const shape = { format, images, rows: queries, headDim, keys, tileKeys: tileKeys(headDim, format) };
  const { choice, decision } = pick(attention, capabilities, shape, variant);
  const chosen = choice.variant;
  // Odd widths: the fewest heads that fill whole quads.
  const headsEach = chosen !== 'scalar' || headDim % 4 === 0 ? 1 : headDim % 2 === 0 ? 2 : 4;
  const groups = groupsOf(chosen, headDim, format, queries);
  return {
    kernel: attention,
    variant: chosen,
    decision,
    choices: {},
    constants: constantsOf(headDim, format, groups, chosen, capabilities),
    operands: { q, k, v, out },
    params: { queries, keys, rowQuads: (heads * headDim) / 4, scale: 1 / Math.sqrt(headDim) },
    grid: [ceilDiv(queries, groups * queriesOf(chosen)), ceilDiv(heads, headsEach), images],
    label: args.label,
    flops: 4 * images * queries * keys * heads * headDim,
  };
}
