/**
 * Adapters of one model on the GPU. The model's layers are cut into groups, one buffer ("page") per group, and an
 * adapter's matrices for a layer go to the page of that layer's group: a dispatch binds one page whatever adapters the
 * rows of its batch use, however many there are. What patches are made of lies there too, as small as the file has it. Decides
 * where an adapter lies; which one may leave is its owner's decision.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { UnetdError } from '../errors.ts';
import type { Device } from '../gpu/device.ts';
import { alignTo, ceilDiv, type Resident, type Storage, storageBytes } from '../gpu/kernel.ts';
import { fromF32 } from '../half.ts';
import type { Layer } from '../unet/config.ts';
import type { Adapter } from './adapter.ts';
import { blockCount, blockSize, pagesOf, quadsOf, writeBlocks } from './blocks.ts';
import type { LowRank, PatchArray } from './change.ts';
import { operandOf, type Page, type PageOptions, Pages } from './pages.ts';
import type { PlacedAdapter, PlacedArray, PlacedLayer, PlacedPatch } from './placed.ts';

export type { PlacedAdapter, PlacedLayer } from './placed.ts';

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

export class AdapterPool {
  readonly #storage: Storage;
  readonly #layers: readonly Layer[];
  readonly #slots: ReadonlyMap<string, number>;
  /** The page of each layer's group. */
  readonly #pageOf: readonly Page[];
  readonly #pages: Pages;
  readonly #regions = new Map<PlacedAdapter, readonly Region[]>();

  constructor(device: Device, storage: Storage, layers: readonly Layer[], options: PageOptions) {
    this.#storage = storage;
    this.#layers = layers;
    this.#slots = new Map(layers.map((layer, slot) => [layer.id, slot]));
    this.#pages = new Pages(device, 4 * storageBytes(storage), options);
    this.#pageOf = pagesOf(layers, options.pages).map((page) => this.#pages.all[page]!);
  }

  /** GPU bytes of all pages, used or not. */
  get sizeBytes(): number {
    return this.#pages.sizeBytes;
  }

  /** GPU bytes the adapter would take. */
  bytesOf(adapter: Adapter): number {
    return quadsIn(this.#plan(adapter).parts) * this.#pages.quadBytes;
  }

  /** Whether its matrices for each page fit into one binding. */
  canHold(adapter: Adapter): boolean {
    return [...byPage(this.#plan(adapter).parts).values()].every(
      (parts) => quadsIn(parts) <= this.#pages.limit,
    );
  }

  /**
   * Uploads an adapter; undefined where a page has no room, so that the owner can let another adapter go. One call at a
   * time: the owner waits for the last.
   */
  async add(adapter: Adapter): Promise<PlacedAdapter | undefined> {
    const { parts: all, layers, patches } = this.#plan(adapter);
    const regions: Region[] = [];
    for (const [page, parts] of byPage(all)) {
      if (await this.#place(page, parts, regions)) continue;
      for (const region of regions) region.page.stretches.give(region);
      return undefined;
    }
    const sizeBytes = quadsIn(regions) * this.#pages.quadBytes;
    const placed = { digest: adapter.digest, layers, patches, sizeBytes };
    this.#regions.set(placed, regions);
    return placed;
  }

  /** Uploads parts into a page, adding to `regions` what they take; false where not all of them have room. */
  async #place(page: Page, parts: readonly Part[], regions: Region[]): Promise<boolean> {
    if (!(await this.#pages.prepare(page, quadsIn(parts)))) return false;
    for (const { quads, bytes, placed } of parts) {
      // Layer by layer, so that holes between other adapters are of use.
      const offset = await this.#pages.take(page, quads);
      if (offset === undefined || this.#pages.isClosed) return false;
      regions.push({ page, offset, quads });
      this.#pages.write(page, offset, bytes());
      placed(offset);
      // Packing a whole adapter takes this thread longer than a step of others may wait.
      await nextTurn();
    }
    return true;
  }

  remove(placed: PlacedAdapter): void {
    for (const region of this.#regions.get(placed) ?? []) region.page.stretches.give(region);
    this.#regions.delete(placed);
  }

  /** The page that holds a layer's matrices, as an operand. */
  operand(slot: number): Resident {
    return operandOf(this.#pageOf[slot]!);
  }

  close(): void {
    this.#pages.close();
    this.#regions.clear();
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
    const page = this.#pageOf[this.#slots.get(layer) ?? 0]!;
    const { dtype, bytes } = array;
    return {
      page,
      quads: ceilDiv(bytes.byteLength, this.#pages.quadBytes),
      bytes: () => wholeWords(bytes),
      placed: (at) => {
        places[name] = {
          kind: 'values',
          operand: operandOf(page),
          at: at * (this.#pages.quadBytes / 4),
          dtype,
        };
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
    return { page: this.#pageOf[slot]!, quads, bytes, placed };
  }

  #slotOf(layer: string): number {
    const slot = this.#slots.get(layer);
    if (slot === undefined) throw new UnetdError('ERR_LORA_MISMATCH', `The model has no layer ${layer}`);
    return slot;
  }
}

const quadsIn = (all: readonly { readonly quads: number }[]): number =>
  all.reduce((sum, { quads }) => sum + quads, 0);

function byPage(all: readonly Part[]): ReadonlyMap<Page, readonly Part[]> {
  const pages = new Map<Page, Part[]>();
  for (const part of all) {
    const parts = pages.get(part.page) ?? [];
    parts.push(part);
    pages.set(part.page, parts);
  }
  return pages;
}

/** Uploads come in whole words. */
function wholeWords(bytes: Uint8Array): Uint8Array {
  if (bytes.byteLength % 4 === 0) return bytes;
  const padded = new Uint8Array(alignTo(bytes.byteLength, 4));
  padded.set(bytes);
  return padded;
}
