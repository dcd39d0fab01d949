/**
 * Which tensors a stack of adapters patches, and with which steps; and what of the stack stays for the layers' own matmuls. Pure.
 */
import type { Resident } from '../gpu/kernel.ts';
import type { PatchStep } from './patch.ts';
import type { PlacedAdapter, PlacedLayer, PlacedPatch } from './placed.ts';
import type { StackEntry } from './table.ts';

/** A tensor as one stack patches it. */
export interface Variant {
  /** The tensor, and the content and strength of every adapter that changes it, in order. */
  readonly key: string;
  readonly tensor: string;
  readonly steps: readonly PatchStep[];
}

/** Where low-rank terms lie. */
export interface Slots {
  /** The slot of a tensor that is a layer's weight, else undefined. */
  readonly slotOf: (tensor: string) => number | undefined;
  /** The buffer with the blocks of a slot. */
  readonly blocks: (slot: number) => Resident;
}

/** Tensor -> variant. Entries of strength 0 must be left out. */
export function variantsOf(stack: readonly StackEntry[], slots: Slots): ReadonlyMap<string, Variant> {
  const tensors = new Set(stack.flatMap(({ adapter }) => [...adapter.patches.keys()]));
  const variants = new Map<string, Variant>();
  for (const tensor of tensors) {
    const names: string[] = [];
    const steps: PatchStep[] = [];
    for (const entry of stack) {
      const patch = patchOf(entry.adapter, tensor, slots);
      if (!patch) continue;
      names.push(nameOf(entry));
      steps.push({ patch, strength: entry.strength });
    }
    variants.set(tensor, { key: `${tensor} ${names.join('+')}`, tensor, steps });
  }
  return variants;
}

/** The content of an adapter and its strength. */
export const nameOf = ({ adapter, strength }: StackEntry): string => `${adapter.digest}@${strength}`;

/** How an adapter changes a tensor; low-rank terms become a patch where the tensor is patched anyway. */
function patchOf({ patches, layers }: PlacedAdapter, tensor: string, slots: Slots): PlacedPatch | undefined {
  const patch = patches.get(tensor);
  const slot = patch ? undefined : slots.slotOf(tensor);
  const layer = slot === undefined ? undefined : layers.get(slot);
  return layer ? asPatch(tensor, layer, slots.blocks(slot!)) : patch;
}

function asPatch(tensor: string, { scale, blocks }: PlacedLayer, operand: Resident): PlacedPatch {
  const delta = { kind: 'blocks', operand, at: blocks[0]!.down, count: blocks.length } as const;
  return { tensor, rule: 'low rank', scale, arrays: { delta }, sizes: {} };
}

/** A stack without the low-rank terms of the tensors that it patches. */
export function lowRankOf(
  stack: readonly StackEntry[],
  variants: ReadonlyMap<string, Variant>,
  { slotOf }: Slots,
): readonly StackEntry[] {
  const patched = new Set([...variants.keys()].map(slotOf));
  return stack.map(({ adapter, strength }) => {
    const layers = new Map([...adapter.layers].filter(([slot]) => !patched.has(slot)));
    return { adapter: { ...adapter, layers }, strength };
  });
}
