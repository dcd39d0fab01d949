/**
 * Adapters of one model on the GPU. The model's layers are cut into groups, one buffer ("page") per group, and an
 * adapter's matrices for a layer go to the page of that layer's group: a dispatch binds one page whatever adapters the
 * rows of its batch use, however many there are. Owns the pages; which adapter may leave is its owner's decision.
 */
import { UnetdError } from '../errors.ts';
import { type Device, Usage } from '../gpu/device.ts';
import { type Resident, type Storage, storageBytes } from '../gpu/kernel.ts';
import { fromF32 } from '../half.ts';
import type { Layer } from '../unet/config.ts';
import type { Adapter, AdapterLayer } from './adapter.ts';
import { blockCount, blockSize, quadsOf, writeBlocks } from './blocks.ts';
import { Stretches } from './stretches.ts';

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

export interface PoolOptions {
  /** Groups of about equal size; each page may grow to the largest binding of the adapter. */
  readonly pages: number;
  /** Most bytes of all pages together. */
  readonly limitBytes?: number;
  /** GPU bytes that may be taken now, asked for at each growth. */
  readonly spareBytes?: () => number;
}

interface Part {
  readonly layer: AdapterLayer;
  readonly slot: number;
  readonly quads: number;
}

interface Region {
  readonly page: Page;
  readonly offset: number;
  readonly quads: number;
}

interface Page {
  buffer: GPUBuffer | undefined;
  readonly stretches: Stretches;
}

const FIRST_PAGE_BYTES = 64 * 1024;

export class AdapterPool {
  readonly #device: Device;
  readonly #storage: Storage;
  readonly #layers: readonly Layer[];
  readonly #options: PoolOptions;
  readonly #slots: ReadonlyMap<string, number>;
  readonly #pageOf: readonly number[];
  readonly #pages: readonly Page[];
  readonly #regions = new Map<PlacedAdapter, readonly Region[]>();
  #closed = false;

  constructor(device: Device, storage: Storage, layers: readonly Layer[], options: PoolOptions) {
    this.#device = device;
    this.#storage = storage;
    this.#layers = layers;
    this.#options = options;
    this.#slots = new Map(layers.map((layer, slot) => [layer.id, slot]));
    const { pages } = options;
    const sizes = layers.map((layer) => quadsOf(blockSize(layer)));
    const total = sizes.reduce((a, b) => a + b, 0);
    let before = 0;
    this.#pageOf = sizes.map((size) => {
      const page = Math.min(pages - 1, Math.floor((before / total) * pages));
      before += size;
      return page;
    });
    this.#pages = Array.from({ length: pages }, () => ({ buffer: undefined, stretches: new Stretches() }));
  }

  /** GPU bytes of all pages, used or not. */
  get sizeBytes(): number {
    return this.#pages.reduce((sum, page) => sum + (page.buffer?.size ?? 0), 0);
  }

  /** GPU bytes the adapter would take. */
  bytesOf(adapter: Adapter): number {
    return adapter.layers.reduce((sum, layer) => sum + this.#partOf(layer).quads, 0) * this.#quadBytes;
  }

  /**
   * Uploads an adapter; undefined where a page has no room, so that the owner can let another adapter go. One call at a
   * time: the owner waits for the last.
   */
  async add(adapter: Adapter): Promise<PlacedAdapter | undefined> {
    const byPage = new Map<Page, Part[]>();
    for (const part of adapter.layers.map((layer) => this.#partOf(layer))) {
      const page = this.#pages[this.#pageOf[part.slot]!]!;
      const parts = byPage.get(page) ?? [];
      parts.push(part);
      byPage.set(page, parts);
    }
    const regions: Region[] = [];
    const layers = new Map<number, PlacedLayer>();
    for (const [page, parts] of byPage) {
      let hasRoom = await this.#prepare(page, parts);
      for (const part of parts) {
        // Layer by layer, so that holes between other adapters are of use.
        const offset = hasRoom ? await this.#take(page, part.quads) : undefined;
        hasRoom = offset !== undefined;
        if (offset === undefined) continue;
        regions.push({ page, offset, quads: part.quads });
        this.#write(page, part, offset);
        layers.set(part.slot, this.#placed(part, offset));
      }
      if (hasRoom) continue;
      for (const region of regions) region.page.stretches.give(region);
      return undefined;
    }
    const placed = { layers, sizeBytes: regions.reduce((sum, r) => sum + r.quads, 0) * this.#quadBytes };
    this.#regions.set(placed, regions);
    return placed;
  }

  remove(placed: PlacedAdapter): void {
    for (const region of this.#regions.get(placed) ?? []) region.page.stretches.give(region);
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
    this.#closed = true;
    for (const page of this.#pages) page.buffer?.destroy();
    this.#regions.clear();
  }

  get #quadBytes(): number {
    return 4 * storageBytes(this.#storage);
  }

  #partOf(layer: AdapterLayer): Part {
    const slot = this.#slots.get(layer.layer);
    if (slot === undefined)
      throw new UnetdError('ERR_LORA_MISMATCH', `The model has no layer ${layer.layer}`);
    return { layer, slot, quads: blockCount(layer.rank) * quadsOf(blockSize(this.#layers[slot]!)) };
  }

  #placed({ layer, slot }: Part, start: number): PlacedLayer {
    const { down, up } = blockSize(this.#layers[slot]!);
    const blocks = Array.from({ length: blockCount(layer.rank) }, (_, b) => {
      const at = start + b * (down + up);
      return { down: at, up: at + down };
    });
    return { scale: layer.scale, blocks };
  }

  #write(page: Page, { layer, slot, quads }: Part, offset: number): void {
    const values = new Float32Array(quads * 4);
    writeBlocks(values, 0, layer, this.#layers[slot]!);
    const bytes = fromF32(this.#storage === 'f16' ? 'F16' : 'F32', values);
    this.#device.gpu.queue.writeBuffer(page.buffer!, offset * this.#quadBytes, bytes);
  }

  /** Grows a page once for many parts; false where it cannot hold them. */
  async #prepare(page: Page, parts: readonly Part[]): Promise<boolean> {
    const { size, end, free } = page.stretches;
    const wanted = parts.reduce((sum, { quads }) => sum + quads, 0);
    const holes = free.reduce((sum, { quads }) => sum + quads, 0) - (size - end);
    const missing = wanted - holes;
    return end + missing <= size || this.#grow(page, missing);
  }

  async #take(page: Page, quads: number): Promise<number | undefined> {
    return (
      page.stretches.take(quads) ?? ((await this.#grow(page, quads)) ? page.stretches.take(quads) : undefined)
    );
  }

  /** Doubles a page, or more where `quads` need it; false at the limit of a binding, of the pool or of the GPU. */
  async #grow(page: Page, quads: number): Promise<boolean> {
    const { maxBindingBytes, maxBufferBytes } = this.#device.capabilities;
    const { size, end } = page.stretches;
    const limit = Math.floor(Math.min(maxBindingBytes, maxBufferBytes) / this.#quadBytes);
    const least = end + quads;
    if (least > limit) return false;
    // Pages that shrank in use give their tails back only when another page needs them.
    if (least - size > this.#spareQuads()) await this.#trim(page);
    const spare = this.#spareQuads();
    if (least - size > spare) return false;
    const wanted = Math.max(size * 2, least, FIRST_PAGE_BYTES / this.#quadBytes);
    return this.#resize(page, Math.min(limit, size + spare, wanted));
  }

  #spareQuads(): number {
    const { limitBytes = Number.POSITIVE_INFINITY, spareBytes } = this.#options;
    const bytes = Math.min(limitBytes - this.sizeBytes, spareBytes?.() ?? Number.POSITIVE_INFINITY);
    // Buffers come in whole 16 bytes.
    return (Math.floor(bytes / 16) * 16) / this.#quadBytes;
  }

  async #trim(except: Page): Promise<void> {
    for (const page of this.#pages)
      if (page !== except && page.stretches.end < page.stretches.size)
        await this.#resize(page, page.stretches.end);
  }

  /** Moves a page to a buffer of another size, its contents at the same offsets; false where the GPU has no memory for it. */
  async #resize(page: Page, quads: number): Promise<boolean> {
    const usage = Usage.STORAGE | Usage.COPY_DST | Usage.COPY_SRC;
    let buffer: GPUBuffer | undefined;
    try {
      if (quads > 0)
        buffer = await this.#device.guarded('adapters', () =>
          this.#device.createBuffer('adapters', quads * this.#quadBytes, usage),
        );
    } catch (error) {
      if (UnetdError.from(error).code === 'ERR_OUT_OF_MEMORY') return false;
      throw error;
    }
    if (this.#closed) {
      buffer?.destroy();
      return false;
    }
    const keep = page.stretches.end * this.#quadBytes;
    if (page.buffer && buffer && keep > 0) {
      const encoder = this.#device.gpu.createCommandEncoder();
      encoder.copyBufferToBuffer(page.buffer, 0, buffer, 0, keep);
      this.#device.gpu.queue.submit([encoder.finish()]);
    }
    page.buffer?.destroy();
    page.buffer = buffer;
    page.stretches.resize(quads);
    this.#device.generation += 1;
    return true;
  }
}
