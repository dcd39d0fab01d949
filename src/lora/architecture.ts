/**
 * Names of architectures for messages: which one a LoRA was trained for and which one is open. Guesses from widths and
 * key names; nothing is decided by them.
 */
import type { UNetConfig } from '../unet/config.ts';
import { splitKey } from './keys.ts';

/** Width of the text conditioning -> family. */
const BY_CONTEXT: ReadonlyMap<number, string> = new Map([
  [768, 'SD 1.x'],
  [1024, 'SD 2.x'],
  [2048, 'SDXL'],
  [1280, 'the SDXL refiner'],
]);

/** Names of layers that only one family has. */
const BY_NAME: readonly (readonly [RegExp, string])[] = [
  [/(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]/, 'Flux'],
  [/(^|[._])(joint_blocks|joint_transformer_blocks)[._]/, 'SD 3'],
  [/^lora_prior_(unet|te)_/, 'Stable Cascade'],
  [/(^|[._])(motion_modules|time_stack)[._]/, 'a video model'],
  [/^(lora_)?transformer[._]|^(diffusion_model|lora_unet)[._](transformer_)?blocks[._]\d/, 'a DiT'],
];

const CROSS_ATTENTION = /attn2[._](?:processor[._])?to_[kv]$/;

/** Family of the open model, or its context width where that is no known one. */
export function architectureOf({ contextDim }: UNetConfig): string {
  return familyOf(contextDim);
}

function familyOf(contextDim: number): string {
  return BY_CONTEXT.get(contextDim) ?? `a UNet with context width ${contextDim}`;
}

/** Family that a LoRA file was trained for, from its tensors (key -> shape), or null. */
export function trainedFor(
  tensors: Iterable<{ readonly name: string; readonly shape: readonly number[] }>,
): string | null {
  for (const { name, shape } of tensors) {
    const family = BY_NAME.find(([pattern]) => pattern.test(name))?.[1];
    if (family !== undefined) return family;
    const split = splitKey(name);
    const isContext = split?.kind === 'LoRA' && split.part === 'down' && CROSS_ATTENTION.test(split.stem);
    if (isContext && shape.length >= 2) return familyOf(shape[1]!);
  }
  return null;
}
