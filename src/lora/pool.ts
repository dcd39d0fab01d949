/**
 * Adapters of one model on the GPU. The model's layers are cut into groups, one buffer ("page") per group, and an
 * adapter's matrices for a layer go to the page of that layer's group: a dispatch binds one page whatever adapters the
 * rows of its batch use, however many there are. What patches are made of lies there too, as small as the file has it. Owns
 * the pages; which adapter may leave is its owner's decision.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { UnetdError } from '../errors.ts';
import { type Device, Usage } from '../gpu/device.ts';
import { alignTo, ceilDiv, type Resident, type Storage, storageBytes } from '../gpu/kernel.ts';
import { fromF32 } from '../half.ts';
import type { Layer } from '../unet/config.ts';
import type { Adapter } from './adapter.ts';
import { blockCount, blockSize, pagesOf, quadsOf, writeBlocks } from './blocks.ts';
import type { LowRank, PatchArray } from './change.ts';
import type { PlacedAdapter, PlacedArray, PlacedLayer, PlacedPatch } from './placed.ts';
import { Stretches } from './stretches.ts';

export type { PlacedAdapter, PlacedLayer } from './placed.ts';

export interface PoolOptions {
  /** Groups of about equal size; each page may grow to the largest binding of the adapter. */
  readonly pages: number;
  /** Most bytes of all pages together. */
  readonly limitBytes?: number;
  /** GPU bytes that may be taken now, asked for at each growth. */
  readonly spareBytes?: () => number;
}

/** What takes one stretch of a page. */
interface Part {
  readonly page: Page;
  readonly quads: number;
  /** The bytes as they lie there; at most all of the stretch. */
  readonly bytes: () => Uint8Array;
  /** Told where it lies, in quads. */
  readonly placed: (at: number) => void;
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
    this.#pageOf = pagesOf(layers, options.pages);
    this.#pages = Array.from({ length: options.pages }, () => ({
      buffer: undefined,
      stretches: new Stretches(),
    }));
  }

  /** GPU bytes of all pages, used or not. */
  get sizeBytes(): number {
    return this.#pages.reduce((sum, page) => sum + (page.buffer?.size ?? 0), 0);
  }

  /** GPU bytes the adapter would take. */
  bytesOf(adapter: Adapter): number {
    return this.#plan(adapter).parts.reduce((sum, { quads }) => sum + quads, 0) * this.#quadBytes;
  }

  /**
   * Uploads an adapter; undefined where a page has no room, so that the owner can let another adapter go. One call at a
   * time: the owner waits for the last.
   */
  async add(adapter: Adapter): Promise<PlacedAdapter | undefined> {
    const byPage = new Map<Page, Part[]>();
    const { parts: all, layers, patches } = this.#plan(adapter);
    for (const part of all) {
      const parts = byPage.get(part.page) ?? [];
      parts.push(part);
      byPage.set(part.page, parts);
    }
    const regions: Region[] = [];
    for (const [page, parts] of byPage) {
      if (await this.#place(page, parts, regions)) continue;
      for (const region of regions) region.page.stretches.give(region);
      return undefined;
    }
    const sizeBytes = regions.reduce((sum, r) => sum + r.quads, 0) * this.#quadBytes;
    const placed = { digest: adapter.digest, layers, patches, sizeBytes };
    this.#regions.set(placed, regions);
    return placed;
  }

  /** Uploads parts into a page, adding to `regions` what they take; false where not all of them have room. */
  async #place(page: Page, parts: readonly Part[], regions: Region[]): Promise<boolean> {
    if (!(await this.#prepare(page, parts))) return false;
    for (const { quads, bytes, placed } of parts) {
      // Layer by layer, so that holes between other adapters are of use.
      const offset = await this.#take(page, quads);
      if (offset === undefined) return false;
      regions.push({ page, offset, quads });
      this.#device.gpu.queue.writeBuffer(page.buffer!, offset * this.#quadBytes, bytes());
      placed(offset);
      // Packing a whole adapter takes this thread longer than a step of others may wait.
      await nextTurn();
      if (this.#closed) return false;
    }
    return true;
  }

  remove(placed: PlacedAdapter): void {
    for (const region of this.#regions.get(placed) ?? []) region.page.stretches.give(region);
    this.#regions.delete(placed);
  }

  /** The page that holds a layer's matrices, as an operand. */
  operand(slot: number): Resident {
    return operandOf(this.#pages[this.#pageOf[slot]!]!);
  }

  close(): void {
    this.#closed = true;
    for (const page of this.#pages) page.buffer?.destroy();
    this.#regions.clear();
  }

  get #quadBytes(): number {
    return 4 * storageBytes(this.#storage);
  }

  /** The stretches that an adapter takes; `layers` and `patches` are filled as they are placed. */
  #plan(adapter: Adapter): {
    readonly parts: readonly Part[];
    readonly layers: Map<number, PlacedLayer>;
    readonly patches: Map<string, PlacedPatch>;
  } {
    const layers = new Map<number, PlacedLayer>();
    const patches = new Map<string, PlacedPatch>();
    const parts = adapter.layers.map((layer): Part => {
      const slot = this.#slotOf(layer.layer);
      const { down, up } = blockSize(this.#layers[slot]!);
      return this.#blocks(layer, slot, (at) => {
        const blocks = Array.from({ length: blockCount(layer.rank) }, (_, b) => {
          const start = at + b * (down + up);
          return { down: start, up: start + down };
        });
        layers.set(slot, { scale: layer.scale, blocks });
      });
    });
    for (const { tensor, arrays, rule, scale, sizes, axis } of adapter.patches) {
      const places: Record<string, PlacedArray> = {};
      patches.set(tensor, { tensor, rule, scale, sizes, axis, arrays: places });
      for (const [name, array] of Object.entries(arrays))
        parts.push(this.#array(tensor, array, name, places));
    }
    return { parts, layers, patches };
  }

  #array(tensor: string, array: PatchArray, name: string, places: Record<string, PlacedArray>): Part {
    const layer = tensor.replace(/\.(weight|bias)$/, '');
    if (array.kind === 'blocks') {
      const slot = this.#slotOf(layer);
      return this.#blocks(array, slot, (at) => {
        places[name] = { kind: 'blocks', operand: this.operand(slot), at, count: blockCount(array.rank) };
      });
    }
    // Norms belong to no group.
    const page = this.#pages[this.#pageOf[this.#slots.get(layer) ?? 0]!]!;
    const { dtype, bytes } = array;
    return {
      page,
      quads: ceilDiv(bytes.byteLength, this.#quadBytes),
      bytes: () => wholeWords(bytes),
      placed: (at) => {
        places[name] = { kind: 'values', operand: operandOf(page), at: at * (this.#quadBytes / 4), dtype };
      },
    };
  }

  #blocks(factors: LowRank, slot: number, placed: Part['placed']): Part {
    const layer = this.#layers[slot]!;
    const quads = blockCount(factors.rank) * quadsOf(blockSize(layer));
    const bytes = (): Uint8Array => {
      const values = new Float32Array(quads * 4);
      writeBlocks(values, 0, factors, layer);
      return fromF32(this.#storage === 'f16' ? 'F16' : 'F32', values);
    };
    return { page: this.#pages[this.#pageOf[slot]!]!, quads, bytes, placed };
  }

  #slotOf(layer: string): number {
    const slot = this.#slots.get(layer);
    if (slot === undefined) throw new UnetdError('ERR_LORA_MISMATCH', `The model has no layer ${layer}`);
    return slot;
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

function operandOf(page: Page): Resident {
  const current = (): GPUBuffer => {
    if (!page.buffer) throw new Error('no adapter lies in this page');
    return page.buffer;
  };
  return { kind: 'resident', label: 'adapters', current, offset: 0, sizeBytes: 0 };
}

/** Uploads come in whole words. */
function wholeWords(bytes: Uint8Array): Uint8Array {
  if (bytes.byteLength % 4 === 0) return bytes;
  const padded = new Uint8Array(alignTo(bytes.byteLength, 4));
  padded.set(bytes);
  return padded;
}
