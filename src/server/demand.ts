/** Which LoRAs waiting requests ask for. Counts names; knows no requests and loads nothing. */

export class LoraDemand {
  readonly #waiting = new Map<string, number>();

  get waiting(): readonly string[] {
    return [...this.#waiting.keys()];
  }

  /** Counts a request as waiting for these LoRAs until the result is called. */
  wait(loras: readonly string[]): () => void {
    for (const lora of loras) this.#waiting.set(lora, (this.#waiting.get(lora) ?? 0) + 1);
    let over = false;
    return () => {
      if (over) return;
      over = true;
      for (const lora of loras) {
        const left = (this.#waiting.get(lora) ?? 1) - 1;
        if (left > 0) this.#waiting.set(lora, left);
        else this.#waiting.delete(lora);
      }
    };
  }
}
