/** How many requests name each of some things now. Counts; knows no requests. */

export class Tally {
  readonly #counts = new Map<string, number>();

  get names(): readonly string[] {
    return [...this.#counts.keys()];
  }

  of(name: string): number {
    return this.#counts.get(name) ?? 0;
  }

  /** Counts one more of each until the result is called; calling that again changes nothing. */
  add(names: readonly string[]): () => void {
    for (const name of names) this.#counts.set(name, this.of(name) + 1);
    let over = false;
    return () => {
      if (over) return;
      over = true;
      for (const name of names) {
        const left = this.of(name) - 1;
        if (left > 0) this.#counts.set(name, left);
        else this.#counts.delete(name);
      }
    };
  }
}
