/**
 * From the tensors that a file holds for one tensor of the UNet to changes of it: one row per adapter kind, its formula and source
 * in `kinds/`. A kind that is known and not in `ALGEBRA` is refused by the parser.
 *
 * What is additive and of low rank becomes terms of the layer's own matmul (`AdapterLayer`); everything else, and all that is
 * weight-decomposed (DoRA), a patch. With d the `dora_scale`, s the strength and W the weight as the adapters before it left it,
 *   output axis  W' = W + s (d / (||W_row|| + eps) o (W + delta) - W)
 *   input axis   W' = W + s (d / (||(W + delta)_column|| + eps) o (W + delta) - W)
 * as ComfyUI's weight_adapter/base.py has it (DoRA: Liu et al. 2024, arXiv 2402.09353).
 */
import type { Changes } from './change.ts';
import type { TensorFactors } from './factors.ts';
import type { AdapterKind } from './keys.ts';
import { difference, replacement } from './kinds/dense.ts';
import { glora } from './kinds/glora.ts';
import { loha } from './kinds/loha.ts';
import { lokr } from './kinds/lokr.ts';
import { lora } from './kinds/lora.ts';
import { orthogonal } from './kinds/orthogonal.ts';

/** New kinds: give keys.ts their endings part by part, and add a function here. */
export const ALGEBRA: ReadonlyMap<AdapterKind, (factors: TensorFactors) => Changes> = new Map([
  ['LoRA', lora],
  ['LoHa', loha],
  ['LoKr', lokr],
  ['GLoRA', glora],
  ['OFT/BOFT', orthogonal],
  ['full difference', difference],
  ['replaced tensor', replacement],
]);

/** What biases and norms take: they are vectors. */
export const FOR_VECTORS: ReadonlySet<AdapterKind> = new Set(['full difference', 'replaced tensor']);
