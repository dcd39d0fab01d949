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
  constants: { HEAD_DIM: 0, HEAD_QUADS: 0, TILE_KEYS: 0, LANES: 32 },
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

/** Queries of a workgroup, by variant, where they are not 64. */
const QUERIES: Readonly<Record<string, number>> = { broadcast: 32 };

/** Quads of a tile of the `broadcast` variant at most, so that the code of a turn fits an instruction cache of 32 KB. */
const TILE_QUADS = 24;
/** Keys of such a tile; one at least, however wide. */
const tileKeys = (headQuads: number): number =>
  [8, 4, 2].find((count) => count * headQuads <= TILE_QUADS) ?? 1;

/** Keys of a tile for matrix units: as many as leave all that lies in workgroup memory within 16 KiB. */
const matrixKeys = (headDim: number, { input }: MatrixShape): number =>
  headDim * storageBytes(input) <= 160 ? 32 : 16;

function constantsOf(headDim: number, variant: string, capabilities: Capabilities): Dispatch['constants'] {
  if (variant === 'scalar') return { HEAD_DIM: headDim };
  const HEAD_QUADS = headDim / 4;
  if (variant === 'broadcast') return { HEAD_QUADS, TILE_KEYS: tileKeys(HEAD_QUADS) };
  const spec = attention.variants[variant];
  if (!spec?.matrix) return { HEAD_QUADS };
  return { HEAD_QUADS, TILE_KEYS: matrixKeys(headDim, spec.matrix), ...lanesOf(spec, capabilities) };
}

export function attentionOf(args: AttentionArgs, capabilities: Capabilities, variant?: string): Dispatch {
  const { images, heads, headDim, queries, keys, q, k, v, out } = args;
  const format = args.storage ?? 'f32';
  const shape = { format, images, rows: queries, headDim, keys };
  const { choice, decision } = pick(attention, capabilities, shape, variant);
  const chosen = choice.variant;
  // Odd widths: the fewest heads that fill whole quads.
  const headsEach = chosen !== 'scalar' || headDim % 4 === 0 ? 1 : headDim % 2 === 0 ? 2 : 4;
  return {
    kernel: attention,
    variant: chosen,
    decision,
    choices: {},
    constants: constantsOf(headDim, chosen, capabilities),
    operands: { q, k, v, out },
    params: { queries, keys, rowQuads: (heads * headDim) / 4, scale: 1 / Math.sqrt(headDim) },
    grid: [ceilDiv(queries, QUERIES[chosen] ?? 64), ceilDiv(heads, headsEach), images],
    label: args.label,
    flops: 4 * images * queries * keys * heads * headDim,
  };
}
