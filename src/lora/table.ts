/**
 * The table that tells the kernels, for one batch, which low-rank blocks each image has at each layer. A pure function
 * from stacks to words; `shaders/gemm/lora_blocks.wgsl` says how they are read.
 */
import type { LayerInput } from '../unet/tensors.ts';
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
  /** Bytes of scratch that the largest T of any input takes. */
  readonly scratchBytes: number;
}

/**
 * `stacks` has one stack per image; `inputs` what the layers that run read. A strength of 0 equals no adapter. Undefined
 * where nothing is left to apply.
 */
export function loraTable(
  stacks: readonly (readonly StackEntry[])[],
  slots: number,
  inputs: readonly LayerInput[],
): LoraTable | undefined {
  const images = stacks.length;
  const active = stacks.map((stack) => stack.filter((entry) => entry.strength !== 0));
  const used = new Set(active.flatMap((stack) => stack.flatMap(({ adapter }) => [...adapter.layers.keys()])));
  const heads = new Uint32Array(slots * images * 4);
  const rows: number[] = [];
  const blocks = new Map<number, number>();
  let scratchBytes = 0;
  for (const input of inputs) {
    const own = input.slots.filter((slot) => used.has(slot));
    if (own.length === 0) continue;
    let t = 0;
    active.forEach((stack, image) => {
      const first = slots * images + rows.length / 4;
      const t0 = t;
      for (const slot of own) {
        const list = blocksAt(stack, slot, t);
        heads.set([first + t - t0, list.length], (slot * images + image) * 4);
        blocks.set(slot, Math.max(blocks.get(slot) ?? 0, list.length));
        for (const row of list) rows.push(...row);
        t += list.length;
      }
      heads.set([first, t - t0], (input.slots[0]! * images + image) * 4 + 2);
    });
    scratchBytes = Math.max(scratchBytes, t * input.rows * 8 * 4);
  }
  if (rows.length === 0) return undefined;
  const words = new Uint32Array(heads.length + rows.length);
  words.set(heads);
  words.set(rows, heads.length);
  return { words, blocks, scratchBytes };
}

type Row = readonly [down: number, up: number, scaleBits: number, t: number];

/** The blocks of a stack at a slot, whose T's are counted from `t` on. */
function blocksAt(stack: readonly StackEntry[], slot: number, t: number): readonly Row[] {
  const rows: Row[] = [];
  const scale = new Float32Array(1);
  const bits = new Uint32Array(scale.buffer);
  for (const { adapter, strength } of stack) {
    const layer = adapter.layers.get(slot);
    if (!layer) continue;
    scale[0] = strength * layer.scale;
    for (const { down, up } of layer.blocks) rows.push([down, up, bits[0]!, t + rows.length]);
  }
  return rows;
}
