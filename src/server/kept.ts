/**
 * Tensors one connection keeps on the server under its own keys, within a byte limit of its own and one that all connections
 * share; the connection's least recently used go first.
 */
import type { TensorView } from '../safetensors.ts';

/** What the tensors of all connections take and may take. */
export interface KeptSpace {
  readonly limitBytes: number;
  usedBytes: number;
}

export class KeptTensors {
  readonly limitBytes: number;
  readonly #space: KeptSpace;
  readonly #tensors = new Map<string, TensorView>();
  #bytes = 0;

  constructor(limitBytes: number, space: KeptSpace) {
    this.limitBytes = limitBytes;
    this.#space = space;
  }

  get size(): number {
    return this.#tensors.size;
  }

  get bytes(): number {
    return this.#bytes;
  }

  /** Keeps a copy, so that the frame it came in can be freed. One that there is no room for is not kept at all. */
  set(key: string, tensor: TensorView): void {
    this.#drop(key);
    const bytes = tensor.data.byteLength;
    if (bytes > this.limitBytes) return;
    for (const oldest of this.#tensors.keys()) {
      if (this.#hasRoom(bytes)) break;
      this.#drop(oldest);
    }
    if (!this.#hasRoom(bytes)) return;
    this.#tensors.set(key, { ...tensor, data: new Uint8Array(tensor.data) });
    this.#count(bytes);
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
    this.#count(-this.#bytes);
  }

  #hasRoom(bytes: number): boolean {
    const { usedBytes, limitBytes } = this.#space;
    return this.#bytes + bytes <= this.limitBytes && usedBytes + bytes <= limitBytes;
  }

  #drop(key: string): void {
    this.#count(-(this.#tensors.get(key)?.data.byteLength ?? 0));
    this.#tensors.delete(key);
  }

  #count(bytes: number): void {
    this.#bytes += bytes;
    this.#space.usedBytes += bytes;
  }
}
