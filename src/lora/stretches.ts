/**
 * Which parts of a page are free, in quads: a first-fit free list that joins neighbours. Arithmetic only; it owns no
 * memory and knows no adapters.
 */

export interface Stretch {
  readonly offset: number;
  readonly quads: number;
}

export class Stretches {
  #size = 0;
  /** Ascending, never touching. */
  #free: readonly Stretch[] = [];

  /** Quads of the page. */
  get size(): number {
    return this.#size;
  }

  get free(): readonly Stretch[] {
    return this.#free;
  }

  /** Where the last taken stretch ends: a page may shrink to this. */
  get end(): number {
    const last = this.#free.at(-1);
    return last && last.offset + last.quads === this.#size ? last.offset : this.#size;
  }

  /** The offset of `quads` that were free, or undefined where no free stretch is as long. */
  take(quads: number): number | undefined {
    const found = this.#free.find((stretch) => stretch.quads >= quads);
    if (!found) return undefined;
    const rest = { offset: found.offset + quads, quads: found.quads - quads };
    this.#free = this.#free.flatMap((stretch) =>
      stretch !== found ? [stretch] : rest.quads > 0 ? [rest] : [],
    );
    return found.offset;
  }

  /** Gives back what was taken. */
  give({ offset, quads }: Stretch): void {
    if (quads === 0) return;
    const joined: { offset: number; quads: number }[] = [];
    for (const stretch of [...this.#free, { offset, quads }].sort((a, b) => a.offset - b.offset)) {
      const last = joined.at(-1);
      if (last && last.offset + last.quads === stretch.offset) last.quads += stretch.quads;
      else joined.push({ ...stretch });
    }
    this.#free = joined;
  }

  /** Grows the page, or cuts free quads off its end. */
  resize(size: number): void {
    if (size < this.end) throw new RangeError(`${this.end} quads are in use, so ${size} are too few`);
    const { end } = this;
    this.#free = this.#free.filter(({ offset }) => offset < end);
    this.#size = size;
    this.give({ offset: end, quads: size - end });
  }
}
