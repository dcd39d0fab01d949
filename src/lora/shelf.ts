/**
 * The adapters of one model that are on the GPU, by the digest of their tensors: each once, whatever names it has, within a
 * budget, let go least recently used first. Knows no names and reads no files.
 */
import { UnetdError } from '../errors.ts';
import type { Adapter } from './adapter.ts';
import type { AdapterPool, PlacedAdapter } from './pool.ts';

/** An adapter on the GPU. It stays for as long as it is pinned. */
export interface Content {
  readonly placed: PlacedAdapter;
  lastUse: number;
  pins: number;
}

/** How many adapters were put on the GPU and how many had to make room for others; counted on by every shelf it is given to. */
export interface AdapterTurnover {
  adapterLoads: number;
  adapterEvictions: number;
}

export interface ShelfOptions {
  /** Most that all adapters together take on the GPU. */
  readonly budgetBytes: number;
  /** May free other memory once no adapter is left to let go; false where it cannot. */
  readonly makeRoom: (bytes: number) => boolean;
  readonly turnover: AdapterTurnover;
}

export class Shelf {
  readonly #pool: AdapterPool;
  readonly #options: ShelfOptions;
  readonly #contents = new Map<string, Content>();
  #waiting: (() => void)[] = [];
  #clock = 0;
  #closed = false;

  constructor(pool: AdapterPool, options: ShelfOptions) {
    this.#pool = pool;
    this.#options = options;
  }

  has(digest: string): boolean {
    return this.#contents.has(digest);
  }

  /** The adapter of a digest, marked as used. */
  get(digest: string): Content | undefined {
    const content = this.#contents.get(digest);
    if (content) content.lastUse = ++this.#clock;
    return content;
  }

  /**
   * Puts an adapter on the GPU, letting others go for it; one call at a time. Undefined where those that are pinned leave no
   * room, else ERR_OUT_OF_MEMORY. `lora` is what messages call it.
   */
  async place(adapter: Adapter, lora: string): Promise<Content | undefined> {
    this.#refuseClosed(lora);
    const known = this.get(adapter.digest);
    if (known) return known;
    const needed = this.#pool.bytesOf(adapter);
    const { budgetBytes, makeRoom, turnover } = this.#options;
    if (needed > budgetBytes || !this.#pool.canHold(adapter)) throw this.noRoom(adapter, lora);
    let mayAsk = true;
    // Where they cannot make room, none of the others goes in vain.
    while (this.#pinnedBytes + needed <= budgetBytes) {
      const placed = this.#usedBytes + needed <= budgetBytes ? await this.#pool.add(adapter) : undefined;
      this.#refuseClosed(lora);
      if (placed) {
        const content = { placed, lastUse: ++this.#clock, pins: 0 };
        this.#contents.set(adapter.digest, content);
        turnover.adapterLoads += 1;
        return content;
      }
      if (this.evictOne()) continue;
      if (!mayAsk || !makeRoom(needed)) break;
      mayAsk = false;
    }
    if (this.#pinnedBytes > 0) return undefined;
    throw this.noRoom(adapter, lora);
  }

  /** The ERR_OUT_OF_MEMORY of an adapter beside those that are pinned. */
  noRoom(adapter: Adapter, lora: string): UnetdError {
    const [needed, used] = [this.#pool.bytesOf(adapter), this.#pinnedBytes];
    return noRoom(lora, needed, used, this.#options.budgetBytes);
  }

  pin(content: Content): void {
    content.pins += 1;
  }

  unpin(content: Content): void {
    content.pins -= 1;
    if (content.pins === 0) for (const resolve of this.#waiting.splice(0)) resolve();
  }

  /** Resolves when one that is pinned no longer is; at once where none is. */
  async unpinned(): Promise<void> {
    if (this.#pinnedBytes > 0) await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }

  /** Makes an adapter the next to go, unless it is used again. */
  age(digest: string): void {
    const content = this.#contents.get(digest);
    if (content) content.lastUse = 0;
  }

  /** Lets the least recently used adapter go that is not pinned; false where there is none. */
  evictOne(): boolean {
    let oldest: Content | undefined;
    for (const content of this.#contents.values())
      if (content.pins === 0 && content.lastUse < (oldest?.lastUse ?? Number.POSITIVE_INFINITY))
        oldest = content;
    if (!oldest) return false;
    this.#contents.delete(oldest.placed.digest);
    this.#pool.remove(oldest.placed);
    this.#options.turnover.adapterEvictions += 1;
    return true;
  }

  /** Refuses what is placed now; the pool is closed by its owner. */
  close(): void {
    this.#closed = true;
    this.#contents.clear();
  }

  get #usedBytes(): number {
    return bytesOf([...this.#contents.values()]);
  }

  get #pinnedBytes(): number {
    return bytesOf([...this.#contents.values()].filter(({ pins }) => pins > 0));
  }

  #refuseClosed(lora: string): void {
    if (!this.#closed) return;
    throw new UnetdError(
      'ERR_MODEL_NOT_LOADED',
      `The model was unloaded while LoRA "${lora}" was read for it; load both again`,
      { lora },
    );
  }
}

const bytesOf = (contents: readonly Content[]): number =>
  contents.reduce((sum, { placed }) => sum + placed.sizeBytes, 0);

/** The ERR_OUT_OF_MEMORY of an adapter that takes `needed` bytes, beside those of its batch that take `used`. */
export function noRoom(lora: string, needed: number, used: number, budget: number): UnetdError {
  const beside = `those that this batch needs beside it take ${used}`;
  const where =
    used + needed > budget
      ? `the adapters of a model may take ${budget}, and ${beside}`
      : `${beside}, and no memory, or no buffer that the GPU can bind, has room for both`;
  return new UnetdError(
    'ERR_OUT_OF_MEMORY',
    `LoRA "${lora}" takes ${needed} bytes on the GPU; ${where}: use fewer or smaller LoRAs at once, or raise --memory-budget`,
    { lora, needed, used, budget },
  );
}
