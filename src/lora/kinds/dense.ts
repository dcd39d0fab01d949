/**
 * Full differences, W' = W + strength * delta (`diff`, `diff_b`, and `w_norm`, `b_norm` of norms), and replaced tensors, W' = V
 * whatever the strength (`set_weight`). Biases and norms take these alone. ComfyUI: lora.py.
 */
import type { Changes } from '../change.ts';
import {
  type Dense,
  malformed,
  mismatch,
  patchChange,
  shapeOf,
  type TensorFactors,
  tensorName,
  textOf,
  unsupported,
} from '../factors.ts';

export const difference = (factors: TensorFactors): Changes => dense(factors, 'difference', 'delta');

export const replacement = (factors: TensorFactors): Changes => dense(factors, 'replacement', 'value');

function dense(factors: TensorFactors, rule: 'difference' | 'replacement', array: string): Changes {
  const [[part, factor], ...more] = [...factors.dense] as [[string, Dense], ...[string, Dense][]];
  if (more.length > 0) malformed(factors, `both ${factor.key} and ${more[0]![1].key} are its difference`);
  const magnitude = factors.parts.get('dora_scale');
  if (magnitude) unsupported(factors, magnitude.key, `ComfyUI has none beside ${factor.key}`);
  const { shape, dtype, bytes } = factor;
  if (textOf(shape) !== textOf(shapeOf(factors))) mismatch(factors, part, shapeOf(factors), shape);
  const arrays = { [array]: { kind: 'values', dtype, bytes } } as const;
  return patchChange({ tensor: tensorName(factors), rule, scale: 1, arrays, sizes: {}, rank: 0 });
}
