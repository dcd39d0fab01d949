/**
 * Tensors one connection keeps on the server under its own keys, within a byte limit; the least recently used go first.
 */
import type { TensorView } from '../safetensors.ts';

export class KeptTensors {
  readonly limitBytes: number;
  readonly #tensors = new Map<string, TensorView>();
  #bytes = 0;

  constructor(limitBytes: number) {
    this.limitBytes = limitBytes;
  }

  get size(): number {
    return this.#tensors.size;
  }

  get bytes(): number {
    return this.#bytes;
  }

  /** Keeps a copy, so that the frame it came in can be freed. One larger than the limit is not kept at all. */
  set(key: string, tensor: TensorView): void {
    this.#drop(key);
    const bytes = tensor.data.byteLength;
    if (bytes > this.limitBytes) return;
    for (const oldest of this.#tensors.keys()) {
      if (this.#bytes + bytes <= this.limitBytes) break;
      this.#drop(oldest);
    }
    this.#tensors.set(key, { ...tensor, data: new Uint8Array(tensor.data) });
    this.#bytes += bytes;
  }

  get(key: string): TensorView | undefined {
    const tensor = this.#tensors.get(key);
    if (tensor === undefined) return undefined;
    this.#tensors.delete(key);
    this.#tensors.set(key, tensor);
    return tensor;
  }

  clear(): void {
    this.#tensors.clear();
    this.#bytes = 0;
  }

  #drop(key: string): void {
    this.#bytes -= this.#tensors.get(key)?.data.byteLength ?? 0;
    this.#tensors.delete(key);
  }
}
