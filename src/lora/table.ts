/**
 * The table that tells the kernels, for one batch, which low-rank blocks each image has at each layer. A pure function
 * from stacks to words; `shaders/gemm/lora_blocks.wgsl` says how they are read.
 */
import type { PlacedAdapter } from './pool.ts';

/** One adapter of an image's stack. */
export interface StackEntry {
  readonly adapter: PlacedAdapter;
  readonly strength: number;
}

export interface LoraTable {
  /** Rows of four words: `slots * images` heads, then the blocks. */
  readonly words: Uint32Array;
  /** Blocks of the longest stack at a slot; 0 where no image has any. */
  readonly blocks: ReadonlyMap<number, number>;
  /** Bytes of scratch that the largest T of any layer takes. */
  readonly scratchBytes: number;
}

/**
 * `stacks` has one stack per image; `slotRows` the rows per image of every layer that runs. A strength of 0 equals no
 * adapter. Undefined where nothing is left to apply.
 */
export function loraTable(
  stacks: readonly (readonly StackEntry[])[],
  slots: number,
  slotRows: ReadonlyMap<number, number>,
): LoraTable | undefined {
  const images = stacks.length;
  const active = stacks.map((stack) => stack.filter((entry) => entry.strength !== 0));
  const used = new Set(active.flatMap((stack) => stack.flatMap(({ adapter }) => [...adapter.layers.keys()])));
  const heads = slots * images;
  const rows: number[] = [];
  const blocks = new Map<number, number>();
  const firsts = new Uint32Array(heads * 4);
  let scratchBytes = 0;
  const scale = new Float32Array(1);
  const scaleBits = new Uint32Array(scale.buffer);
  for (const slot of used) {
    const m = slotRows.get(slot);
    if (m === undefined) continue;
    let inSlot = 0;
    active.forEach((stack, image) => {
      const first = inSlot;
      firsts[(slot * images + image) * 4] = heads + rows.length / 4;
      for (const { adapter, strength } of stack) {
        const layer = adapter.layers.get(slot);
        if (!layer) continue;
        scale[0] = strength * layer.scale;
        for (const block of layer.blocks) rows.push(block.down, block.up, scaleBits[0]!, inSlot++);
      }
      firsts[(slot * images + image) * 4 + 1] = inSlot - first;
      blocks.set(slot, Math.max(blocks.get(slot) ?? 0, inSlot - first));
    });
    scratchBytes = Math.max(scratchBytes, inSlot * m * 8 * 4);
  }
  if (rows.length === 0) return undefined;
  const words = new Uint32Array(heads * 4 + rows.length);
  words.set(firsts);
  words.set(rows, heads * 4);
  return { words, blocks, scratchBytes };
}
