/** The registry: every kernel, once. Tests and benchmarks walk it. */
import type { Kernel } from '../gpu/kernel.ts';
import { attention } from './attention.ts';
import { copy, fromNchw, geglu, toNchw } from './elementwise.ts';
import { gemm, loraDown } from './gemm.ts';
import { groupApply, groupMoments, layerNorm } from './norm.ts';
import { pack, quantise } from './pack.ts';
import { combine, norms, product, rotate, unpack } from './patch.ts';
import { gemmReduce } from './split_k.ts';

export const KERNELS: readonly Kernel[] = [
  gemm,
  gemmReduce,
  loraDown,
  attention,
  groupMoments,
  groupApply,
  layerNorm,
  geglu,
  copy,
  fromNchw,
  toNchw,
  pack,
  quantise,
  unpack,
  combine,
  product,
  rotate,
  norms,
];
