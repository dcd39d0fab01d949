/**
 * The GPU memory that one engine may take: what is in use, who may leave, and what is said where there is no room.
 * Counts; it allocates and frees nothing itself.
 */
import { UnetdError } from '../errors.ts';

/** GPU bytes by what they are for. */
export interface MemoryUse {
  readonly weightBytes: number;
  readonly adapterBytes: number;
  readonly arenaBytes: number;
}

export interface BudgetOptions {
  readonly limitBytes: number;
  readonly use: () => MemoryUse;
  /** Bytes of the models that no request uses. */
  readonly idleBytes: () => number;
  /** Lets the least recently used of those go; false where there is none. */
  readonly evict: () => boolean;
}

export class Budget {
  readonly limitBytes: number;
  readonly #options: BudgetOptions;
  #reservedBytes = 0;
  #peakBytes = 0;

  constructor(options: BudgetOptions) {
    this.limitBytes = options.limitBytes;
    this.#options = options;
  }

  get usedBytes(): number {
    const { weightBytes, adapterBytes, arenaBytes } = this.#options.use();
    return weightBytes + adapterBytes + arenaBytes + this.#reservedBytes;
  }

  get spareBytes(): number {
    return Math.max(0, this.limitBytes - this.usedBytes);
  }

  /** The most that was ever in use when noted. */
  get peakBytes(): number {
    return this.#peakBytes;
  }

  notePeak(): void {
    this.#peakBytes = Math.max(this.#peakBytes, this.usedBytes);
  }

  /** Counts bytes as used until the result is called. */
  reserve(bytes: number): () => void {
    this.#reservedBytes += bytes;
    this.notePeak();
    return () => {
      this.#reservedBytes -= bytes;
    };
  }

  /** Lets idle models go until `bytes` fit; where even all of them would not do, none goes and the result is false. */
  makeRoom(bytes: number): boolean {
    if (this.usedBytes - this.#options.idleBytes() + bytes > this.limitBytes) return false;
    while (this.usedBytes + bytes > this.limitBytes) if (!this.#options.evict()) return false;
    return true;
  }

  /** `makeRoom` for something that needs `bytes` and has `heldBytes` of them already. ERR_OUT_OF_MEMORY. */
  demand(what: string, bytes: number, heldBytes: number, cure: string): void {
    if (this.makeRoom(bytes - heldBytes)) return;
    const used = this.usedBytes - heldBytes - this.#options.idleBytes();
    throw new UnetdError(
      'ERR_OUT_OF_MEMORY',
      `${what} need ${bytes} bytes on the GPU, and of the budget of ${this.limitBytes} other things in use take ${used}: ${cure}`,
      { needed: bytes, used, budget: this.limitBytes },
    );
  }
}
