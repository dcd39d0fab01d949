/**
 * Where tensors of a plan live: offsets in one buffer, shared by tensors that are never alive together (pure), and a
 * buffer that grows to the largest plan (stateful).
 */
import { type Device, Usage } from './device.ts';
import { alignTo, type Resident } from './kernel.ts';

/** Bytes needed from step `first` to step `last`, both included. */
export interface Lifetime {
  readonly sizeBytes: number;
  readonly first: number;
  readonly last: number;
}

export interface Placement {
  readonly offsets: readonly number[];
  readonly totalBytes: number;
  /** Largest sum of sizes alive at one step: no placement needs less. */
  readonly lowerBoundBytes: number;
}

/** Greedy by size: the largest tensors first, each at the lowest offset free over its whole life. */
export function place(lifetimes: readonly Lifetime[], alignment: number): Placement {
  const sizes = lifetimes.map((l) => alignTo(l.sizeBytes, alignment));
  const offsets = lifetimes.map(() => 0);
  const order = sizes.map((_, i) => i).sort((a, b) => sizes[b]! - sizes[a]! || a - b);
  const placed: number[] = [];
  let totalBytes = 0;
  for (const i of order) {
    const life = lifetimes[i]!;
    let offset = 0;
    for (const j of placed) {
      const other = lifetimes[j]!;
      if (other.last < life.first || other.first > life.last) continue;
      if (offset + sizes[i]! <= offsets[j]!) break;
      offset = Math.max(offset, offsets[j]! + sizes[j]!);
    }
    offsets[i] = offset;
    totalBytes = Math.max(totalBytes, offset + sizes[i]!);
    const at = placed.findIndex((j) => offsets[j]! > offset);
    placed.splice(at < 0 ? placed.length : at, 0, i);
  }
  let lowerBoundBytes = 0;
  for (const { first } of lifetimes) {
    let alive = 0;
    lifetimes.forEach((l, i) => {
      if (l.first <= first && first <= l.last) alive += sizes[i]!;
    });
    lowerBoundBytes = Math.max(lowerBoundBytes, alive);
  }
  return { offsets, totalBytes, lowerBoundBytes };
}

/** One buffer that is replaced by a larger one on demand; its contents are lost then. */
export class Arena {
  readonly #device: Device;
  readonly #label: string;
  #buffer: GPUBuffer | undefined;

  constructor(device: Device, label: string) {
    this.#device = device;
    this.#label = label;
  }

  get sizeBytes(): number {
    return this.#buffer?.size ?? 0;
  }

  get buffer(): GPUBuffer {
    if (!this.#buffer) throw new Error(`${this.#label} is used before it has a size`);
    return this.#buffer;
  }

  /** All of the buffer, as it is when it is bound. */
  get operand(): Resident {
    return { kind: 'resident', label: this.#label, current: () => this.buffer, offset: 0, sizeBytes: 0 };
  }

  /** Makes room for `sizeBytes`. ERR_OUT_OF_MEMORY. */
  async ensure(sizeBytes: number): Promise<void> {
    if (sizeBytes <= this.sizeBytes) return;
    // The old buffer goes first, so that growing never needs both at once; it goes when no work on its way uses it any more.
    if (this.#buffer) await this.#device.settle(() => this.#device.gpu.queue.onSubmittedWorkDone());
    this.#buffer?.destroy();
    this.#buffer = undefined;
    this.#device.generation += 1;
    this.#buffer = await this.#device.guarded(this.#label, () =>
      this.#device.createBuffer(this.#label, sizeBytes, Usage.STORAGE | Usage.COPY_DST | Usage.COPY_SRC),
    );
  }

  close(): void {
    this.#buffer?.destroy();
    this.#buffer = undefined;
  }
}
