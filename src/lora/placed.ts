/** An adapter on the GPU: where its matrices lie. Types only; pool.ts places them. */
import type { Resident } from '../gpu/kernel.ts';
import type { AdapterPatch } from './change.ts';

/** Where the blocks of one layer of an adapter lie, in quads from the start of the page. */
export interface PlacedLayer {
  readonly scale: number;
  readonly blocks: readonly { readonly down: number; readonly up: number }[];
}

/** Where an array of a patch lies: low-rank blocks from a quad of the operand on, or values from a 32-bit word on. */
export type PlacedArray =
  | { readonly kind: 'blocks'; readonly operand: Resident; readonly at: number; readonly count: number }
  | { readonly kind: 'values'; readonly operand: Resident; readonly at: number; readonly dtype: string };

export interface PlacedPatch extends Omit<AdapterPatch, 'arrays' | 'rank'> {
  readonly arrays: Readonly<Record<string, PlacedArray>>;
}

/** An adapter on the GPU. */
export interface PlacedAdapter {
  readonly digest: string;
  /** Slot -> its blocks. */
  readonly layers: ReadonlyMap<number, PlacedLayer>;
  /** LDM name of a tensor -> how it is patched. */
  readonly patches: ReadonlyMap<string, PlacedPatch>;
  readonly sizeBytes: number;
}
