/**
 * What the demo asks for: six workflows that run at once on one model, each with prompts, LoRA stack and seed of its own.
 * Data only. Prompts are pairs of trained words; the words are the keys of `assets/prompts.safetensors`.
 */
import type { LoraUse } from '../src/engine/types.ts';

export interface Prompt {
  readonly subject: string;
  readonly ground: string;
}

export interface Workflow {
  readonly name: string;
  readonly prompts: readonly Prompt[];
  readonly loras: readonly LoraUse[];
  readonly seed: number;
}

export const MODEL = 'emoji-unet.safetensors';
/** [C, H, W] of one picture. */
export const PICTURE_SHAPE = [3, 32, 32] as const;

const INK = 'ink.safetensors';
const NEON = 'neon.safetensors';
const TERRACOTTA = 'terracotta.safetensors';

function prompts(...pairs: readonly string[]): readonly Prompt[] {
  return pairs.map((pair) => {
    const [subject, ground] = pair.split(' on ');
    return { subject: subject!, ground: ground! };
  });
}

export const WORKFLOWS: readonly Workflow[] = [
  {
    name: 'plain',
    prompts: prompts('apple on mint', 'burger on sky', 'butterfly on white', 'sunflower on white'),
    loras: [],
    seed: 11,
  },
  {
    name: 'ink',
    prompts: prompts('apple on white', 'butterfly on sky', 'heart on sand', 'star on white'),
    loras: [{ lora: INK, strength: 1 }],
    seed: 22,
  },
  {
    name: 'neon',
    prompts: prompts('cactus on night', 'umbrella on sky', 'butterfly on mint', 'frog on white'),
    loras: [{ lora: NEON, strength: 1 }],
    seed: 33,
  },
  {
    name: 'terracotta',
    prompts: prompts('panda on sand', 'car on white', 'heart on rose', 'penguin on night'),
    loras: [{ lora: TERRACOTTA, strength: 1 }],
    seed: 44,
  },
  {
    name: 'two at once',
    prompts: prompts('strawberry on mint', 'star on night', 'burger on sky', 'butterfly on white'),
    loras: [
      { lora: NEON, strength: 0.6 },
      { lora: TERRACOTTA, strength: 0.6 },
    ],
    seed: 55,
  },
  {
    name: 'against neon',
    prompts: prompts('frog on rose', 'strawberry on mint', 'sun on sky', 'car on sand'),
    loras: [
      { lora: INK, strength: 0.4 },
      { lora: NEON, strength: -0.3 },
    ],
    seed: 66,
  },
];

/** A stack as people write it: `ink 0.4 + neon -0.3`. */
export function stackLabel(loras: readonly LoraUse[]): string {
  if (loras.length === 0) return 'no LoRA';
  return loras.map(({ lora, strength }) => `${lora.replace('.safetensors', '')} ${strength}`).join(' + ');
}
