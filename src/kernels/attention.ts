/** Multi-head attention that never stores the scores. Formulas and layouts stand in `shaders/attention/`. */
import {
  type Capabilities,
  ceilDiv,
  type Dispatch,
  defineKernel,
  type Kernel,
  type Operand,
} from '../gpu/kernel.ts';
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
  constants: { HEAD_DIM: 0, HEAD_QUADS: 0, QUERIES: 8, WORKGROUP: 64 },
  variants: {
    broadcast: { files: ['attention/broadcast.wgsl'], subgroupSize: 8 },
    direct: { files: ['attention/direct.wgsl'] },
    scalar: { files: ['attention/scalar.wgsl'] },
  },
});

export interface AttentionArgs {
  readonly label: string;
  readonly images: number;
  readonly heads: number;
  readonly headDim: number;
  readonly queries: number;
  readonly keys: number;
  /** q, out [images, queries, heads * headDim]; k, v [images, keys, heads * headDim]. */
  readonly q: Operand;
  readonly k: Operand;
  readonly v: Operand;
  readonly out: Operand;
}

/**
 * Queries a subgroup of the `broadcast` variant keeps in registers, one a lane. Half as many took lavapipe 1.3 to 1.5
 * times as long at every head width.
 */
const BROADCAST_QUERIES = 8;

export function attentionOf(args: AttentionArgs, capabilities: Capabilities, variant?: string): Dispatch {
  const { images, heads, headDim, queries, keys, q, k, v, out } = args;
  const chosen = variant ?? pick(attention, capabilities, { headDim });
  const scalarHeads = headDim % 2 === 1 ? 4 : headDim % 4 === 2 ? 2 : 1;
  const grids: Readonly<Record<string, readonly [number, number, number]>> = {
    broadcast: [ceilDiv(queries, 8 * BROADCAST_QUERIES), heads, images],
    direct: [ceilDiv(queries, 64), heads, images],
    scalar: [ceilDiv(queries, 64), ceilDiv(heads, scalarHeads), images],
  };
  const constants: Readonly<Record<string, Record<string, number>>> = {
    broadcast: { HEAD_QUADS: headDim / 4, QUERIES: BROADCAST_QUERIES },
    direct: { HEAD_QUADS: headDim / 4 },
    scalar: { HEAD_DIM: headDim },
  };
  return {
    kernel: attention,
    variant: chosen,
    choices: {},
    constants: constants[chosen]!,
    operands: { q, k, v, out },
    params: { queries, keys, rowQuads: (heads * headDim) / 4, scale: 1 / Math.sqrt(headDim) },
    grid: grids[chosen]!,
    label: args.label,
    flops: 4 * images * queries * keys * heads * headDim,
  };
}
