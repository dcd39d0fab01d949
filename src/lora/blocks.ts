/**
 * How the low-rank matrices of one layer lie in memory: blocks of 8 ranks, each `down` [k][8] then `up` [panels][8][32],
 * zero padded. The layout that `shaders/gemm/lora_down.wgsl` and `lora_blocks.wgsl` read; no GPU here.
 */
import { ceilDiv } from '../gpu/kernel.ts';
import { RANK_BLOCK } from '../kernels/gemm.ts';
import { PANEL } from '../kernels/panel.ts';
import type { Layer } from '../unet/config.ts';
import { firstReader } from '../unet/layers.ts';
import { storedChannels } from '../unet/tensors.ts';
import type { LowRank } from './change.ts';

/** Quads (four values) of the two parts of a block. */
export interface BlockSize {
  readonly down: number;
  readonly up: number;
}

export function blockSize({ inFeatures, outFeatures, kernel }: Layer): BlockSize {
  return {
    down: (kernel ** 2 * storedChannels(inFeatures) * RANK_BLOCK) / 4,
    up: (ceilDiv(outFeatures, PANEL) * PANEL * RANK_BLOCK) / 4,
  };
}

export const quadsOf = ({ down, up }: BlockSize): number => down + up;

export const blockCount = (rank: number): number => ceilDiv(rank, RANK_BLOCK);

/** The page of each layer: groups of about equal size, and layers that share a down projection in one. */
export function pagesOf(layers: readonly Layer[], pages: number): readonly number[] {
  const sizes = layers.map((layer) => quadsOf(blockSize(layer)));
  const total = sizes.reduce((sum, size) => sum + size, 0);
  const byReader = new Map<string, number>();
  let before = 0;
  return layers.map(({ id }, slot) => {
    const own = Math.min(pages - 1, Math.floor((before / total) * pages));
    before += sizes[slot]!;
    const page = byReader.get(firstReader(id)) ?? own;
    byReader.set(id, page);
    return page;
  });
}

/** Writes the blocks of a layer from element `start` on; ranks, channels and columns past the end stay 0. */
export function writeBlocks(
  target: Float32Array,
  start: number,
  { rank, down, up }: LowRank,
  { inFeatures, outFeatures, kernel }: Layer,
): void {
  const taps = kernel ** 2;
  const stored = storedChannels(inFeatures);
  const panels = ceilDiv(outFeatures, PANEL);
  let at = start;
  for (let block = 0; block < blockCount(rank); block++) {
    const ranks = Math.min(RANK_BLOCK, rank - block * RANK_BLOCK);
    for (let r = 0; r < ranks; r++) {
      const row = (block * RANK_BLOCK + r) * taps * inFeatures;
      for (let tap = 0; tap < taps; tap++)
        for (let c = 0; c < inFeatures; c++)
          target[at + (tap * stored + c) * RANK_BLOCK + r] = down[row + tap * inFeatures + c]!;
    }
    at += taps * stored * RANK_BLOCK;
    for (let n = 0; n < outFeatures; n++) {
      const column = at + Math.floor(n / PANEL) * RANK_BLOCK * PANEL + (n % PANEL);
      for (let r = 0; r < ranks; r++) target[column + r * PANEL] = up[n * rank + block * RANK_BLOCK + r]!;
    }
    at += panels * RANK_BLOCK * PANEL;
  }
}
