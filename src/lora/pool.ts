/**
 * Adapters of one model on the GPU. The model's layers are cut into groups, one buffer ("page") per group, and an
 * adapter's matrices for a layer go to the page of that layer's group: a dispatch binds one page whatever adapters the
 * rows of its batch use, however many there are. Owns the pages; which adapter may leave is its owner's decision.
 */
import { UnetdError } from '../errors.ts';
import { type Device, Usage } from '../gpu/device.ts';
import { ceilDiv, type Resident, type Storage, storageBytes } from '../gpu/kernel.ts';
import { fromF32 } from '../half.ts';
import { PANEL, RANK_BLOCK } from '../kernels/gemm.ts';
import type { Layer } from '../unet/config.ts';
import { storedChannels } from '../unet/draft.ts';
import type { Adapter, AdapterLayer } from './adapter.ts';

/** Quads of one block of 8 ranks of a layer: `down` [k][8] then `up` [panels][8][32]. */
interface BlockSize {
  readonly down: number;
  readonly up: number;
}

/** Where the blocks of one layer of an adapter lie, in quads from the start of the page. */
export interface PlacedLayer {
  readonly scale: number;
  readonly blocks: readonly { readonly down: number; readonly up: number }[];
}

/** An adapter on the GPU: slot -> its blocks. */
export interface PlacedAdapter {
  readonly layers: ReadonlyMap<number, PlacedLayer>;
  readonly sizeBytes: number;
}

interface Region {
  readonly page: number;
  readonly offset: number;
  readonly quads: number;
}

interface Page {
  buffer: GPUBuffer | undefined;
  /** Free stretches in quads, ascending, never touching. */
  free: { offset: number; quads: number }[];
  quads: number;
}

const FIRST_PAGE_BYTES = 1024 * 1024;

export class AdapterPool {
  readonly #device: Device;
  readonly #storage: Storage;
  readonly #layers: readonly Layer[];
  readonly #slots: ReadonlyMap<string, number>;
  readonly #pageOf: readonly number[];
  readonly #pages: Page[];
  readonly #regions = new Map<PlacedAdapter, readonly Region[]>();

  /** `pages` groups of about equal size; each page may grow to the largest binding of the adapter. */
  constructor(device: Device, storage: Storage, layers: readonly Layer[], pages: number) {
    this.#device = device;
    this.#storage = storage;
    this.#layers = layers;
    this.#slots = new Map(layers.map((layer, slot) => [layer.id, slot]));
    const sizes = layers.map((layer) => quadsOf(blockSize(layer)));
    const total = sizes.reduce((a, b) => a + b, 0);
    let before = 0;
    this.#pageOf = sizes.map((size) => {
      const page = Math.min(pages - 1, Math.floor((before / total) * pages));
      before += size;
      return page;
    });
    this.#pages = Array.from({ length: pages }, () => ({ buffer: undefined, free: [], quads: 0 }));
  }

  /** GPU bytes of all pages, used or not. */
  get sizeBytes(): number {
    return this.#pages.reduce((sum, page) => sum + (page.buffer?.size ?? 0), 0);
  }

  /** GPU bytes the adapter would take. */
  bytesOf(adapter: Adapter): number {
    let quads = 0;
    for (const layer of adapter.layers)
      quads += ceilDiv(layer.rank, RANK_BLOCK) * quadsOf(blockSize(this.#layerOf(layer)));
    return quads * this.#quadBytes;
  }

  /** Uploads an adapter; undefined where a page has no room, so that the owner can let another adapter go. */
  add(adapter: Adapter): PlacedAdapter | undefined {
    const byPage = new Map<number, { layer: AdapterLayer; slot: number; blocks: number; quads: number }[]>();
    for (const layer of adapter.layers) {
      const slot = this.#slotOf(layer);
      const blocks = ceilDiv(layer.rank, RANK_BLOCK);
      const quads = blocks * quadsOf(blockSize(this.#layers[slot]!));
      const page = this.#pageOf[slot]!;
      byPage.set(page, [...(byPage.get(page) ?? []), { layer, slot, blocks, quads }]);
    }
    const regions: Region[] = [];
    const layers = new Map<number, PlacedLayer>();
    for (const [page, parts] of byPage) {
      const quads = parts.reduce((sum, part) => sum + part.quads, 0);
      const offset = this.#allocate(page, quads);
      if (offset === undefined) {
        for (const region of regions) this.#release(region);
        return undefined;
      }
      regions.push({ page, offset, quads });
      const values = new Float32Array(quads * 4);
      let at = 0;
      for (const { layer, slot, blocks, quads: size } of parts) {
        const { down, up } = blockSize(this.#layers[slot]!);
        writeBlocks(values, at * 4, layer, this.#layers[slot]!, blocks);
        layers.set(slot, {
          scale: layer.scale,
          blocks: Array.from({ length: blocks }, (_, b) => {
            const start = offset + at + b * (down + up);
            return { down: start, up: start + down };
          }),
        });
        at += size;
      }
      const bytes = fromF32(this.#storage === 'f16' ? 'F16' : 'F32', values);
      this.#device.gpu.queue.writeBuffer(this.#pages[page]!.buffer!, offset * this.#quadBytes, bytes);
    }
    const placed = { layers, sizeBytes: regions.reduce((sum, r) => sum + r.quads, 0) * this.#quadBytes };
    this.#regions.set(placed, regions);
    return placed;
  }

  remove(placed: PlacedAdapter): void {
    for (const region of this.#regions.get(placed) ?? []) this.#release(region);
    this.#regions.delete(placed);
  }

  /** The page that holds a layer's matrices, as an operand. */
  operand(slot: number): Resident {
    const page = this.#pages[this.#pageOf[slot]!]!;
    const current = (): GPUBuffer => {
      if (!page.buffer) throw new Error(`no adapter has matrices for slot ${slot}`);
      return page.buffer;
    };
    return { kind: 'resident', label: 'adapters', current, offset: 0, sizeBytes: 0 };
  }

  close(): void {
    for (const page of this.#pages) page.buffer?.destroy();
    this.#regions.clear();
  }

  get #quadBytes(): number {
    return 4 * storageBytes(this.#storage);
  }

  #slotOf({ layer }: AdapterLayer): number {
    const slot = this.#slots.get(layer);
    if (slot === undefined) throw new UnetdError('ERR_LORA_MISMATCH', `The model has no layer ${layer}`);
    return slot;
  }

  #layerOf(layer: AdapterLayer): Layer {
    return this.#layers[this.#slotOf(layer)]!;
  }

  #allocate(index: number, quads: number): number | undefined {
    const page = this.#pages[index]!;
    const fits = (): { offset: number; quads: number } | undefined => page.free.find((f) => f.quads >= quads);
    const stretch = fits() ?? (this.#grow(page, quads) ? fits() : undefined);
    if (!stretch) return undefined;
    const { offset } = stretch;
    stretch.offset += quads;
    stretch.quads -= quads;
    page.free = page.free.filter((f) => f.quads > 0);
    return offset;
  }

  /** Doubles a page, or more where `quads` need it; false at the limit of a binding. */
  #grow(page: Page, quads: number): boolean {
    const { maxBindingBytes, maxBufferBytes } = this.#device.capabilities;
    const limit = Math.floor(Math.min(maxBindingBytes, maxBufferBytes) / this.#quadBytes);
    const wanted = Math.min(
      limit,
      Math.max(page.quads * 2, page.quads + quads, FIRST_PAGE_BYTES / this.#quadBytes),
    );
    const last = page.free.at(-1);
    const tail = last && last.offset + last.quads === page.quads ? last.quads : 0;
    if (wanted - page.quads + tail < quads) return false;
    const usage = Usage.STORAGE | Usage.COPY_DST | Usage.COPY_SRC;
    const buffer = this.#device.createBuffer('adapters', wanted * this.#quadBytes, usage);
    if (page.buffer) {
      const encoder = this.#device.gpu.createCommandEncoder();
      encoder.copyBufferToBuffer(page.buffer, 0, buffer, 0, page.quads * this.#quadBytes);
      this.#device.gpu.queue.submit([encoder.finish()]);
      page.buffer.destroy();
    }
    page.buffer = buffer;
    this.#device.generation += 1;
    const from = page.quads;
    page.quads = wanted;
    release(page, from, wanted - from);
    return true;
  }

  #release({ page, offset, quads }: Region): void {
    release(this.#pages[page]!, offset, quads);
  }
}

/** Gives a stretch back and joins it with its neighbours. */
function release(page: Page, offset: number, quads: number): void {
  const all = [...page.free, { offset, quads }].sort((a, b) => a.offset - b.offset);
  page.free = [];
  for (const stretch of all) {
    const last = page.free.at(-1);
    if (last && last.offset + last.quads === stretch.offset) last.quads += stretch.quads;
    else page.free.push({ ...stretch });
  }
}

function blockSize({ inFeatures, outFeatures, kernel }: Layer): BlockSize {
  return {
    down: (kernel ** 2 * storedChannels(inFeatures) * RANK_BLOCK) / 4,
    up: (ceilDiv(outFeatures, PANEL) * PANEL * RANK_BLOCK) / 4,
  };
}

const quadsOf = ({ down, up }: BlockSize): number => down + up;

/** Lays the matrices of one layer out as blocks; ranks, channels and columns past the end stay 0. */
function writeBlocks(
  target: Float32Array,
  start: number,
  { rank, down, up }: AdapterLayer,
  { inFeatures, outFeatures, kernel }: Layer,
  blocks: number,
): void {
  const taps = kernel ** 2;
  const stored = storedChannels(inFeatures);
  const panels = ceilDiv(outFeatures, PANEL);
  let at = start;
  for (let block = 0; block < blocks; block++) {
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
