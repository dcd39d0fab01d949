/** All cases of all kernels, in one list; the shared tests walk it. */

import { CASES as attention } from './attention.cases.ts';
import type { Case } from './case.ts';
import { CASES as elementwise } from './elementwise.cases.ts';
import { CASES as gemm } from './gemm.cases.ts';
import { CASES as groupNorm } from './group_norm.cases.ts';
import { CASES as layerNorm } from './layer_norm.cases.ts';
import { CASES as loraDown } from './lora_down.cases.ts';
import { CASES as pack } from './pack.cases.ts';
import { CASES as patch } from './patch.cases.ts';
import { CASES as patchCombine } from './patch_combine.cases.ts';

export const CASES: readonly Case[] = [
  ...gemm,
  ...loraDown,
  ...attention,
  ...groupNorm,
  ...layerNorm,
  ...elementwise,
  ...pack,
  ...patch,
  ...patchCombine,
];

/** Variants of a case's kernel that can compute it. */
export const variantsOf = ({ kernel, variants }: Case): readonly string[] =>
  variants ?? Object.keys(kernel.variants);
