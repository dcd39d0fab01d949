/**
 * Weights, biases and norms as the stacks of a batch patch them: each made once on the GPU from the frozen one, kept while there is
 * room, let go least recently used first, and made again at each use where there is none. Owns the copies; the frozen
 * tensors are read only.
 */
import { UnetdError } from '../errors.ts';
import type { Arena } from '../gpu/arena.ts';
import { type Device, Usage } from '../gpu/device.ts';
import type { Dispatch, Resident, Storage } from '../gpu/kernel.ts';
import type { Recordable } from '../gpu/recorder.ts';
import type { Substitute, Substitutes } from '../gpu/substitutes.ts';
import type { UNetConfig } from '../unet/config.ts';
import { type Part, partsOf } from '../unet/layers.ts';
import { isMatrix, placeOf } from '../unet/packed.ts';
import { storedChannels, type WeightSource } from '../unet/tensors.ts';
import { needOf, patchMatrix, patchVector, shapeOf } from './patch.ts';
import type { StackEntry } from './table.ts';
import { lowRankOf, nameOf, type Slots, type Variant, variantsOf } from './variants.ts';
import type { PatchWork, WorkName } from './work.ts';

export interface PatchedOptions {
  /** Most bytes of the copies that are kept. */
  readonly limitBytes: number;
  /** GPU bytes that may be taken now. */
  readonly spareBytes: () => number;
  /** Makes room in a shared buffer. ERR_OUT_OF_MEMORY. */
  readonly ensure: (arena: Arena, sizeBytes: number) => Promise<void>;
  /** The buffer with the low-rank blocks of a slot. */
  readonly blocks: (slot: number) => Resident;
}

/** How the stacks of a batch change tensors. */
export interface Reading {
  /** Tensor -> variant, for each image. */
  readonly byImage: readonly ReadonlyMap<string, Variant>[];
  /** The stacks without what is patched: what stays for the layers' own matmuls. */
  readonly stacks: readonly (readonly StackEntry[])[];
}

/** What the images of one batch bind. Its first `close` counts: once its work is submitted, or when it will not be. */
export interface Patching {
  readonly substitutes: Substitutes;
  readonly close: (submitted: boolean) => void;
}

interface Copy {
  readonly id: number;
  readonly buffer: GPUBuffer;
  isMade: boolean;
  lastUse: number;
  isPinned: boolean;
}

export class PatchedWeights {
  readonly #device: Device;
  readonly #storage: Storage;
  readonly #weights: WeightSource;
  readonly #work: PatchWork;
  readonly #options: PatchedOptions;
  readonly #slots: Slots;
  /** By the name of a tensor. */
  readonly #parts: ReadonlyMap<string, Part>;
  readonly #copies = new Map<string, Copy>();
  #clock = 0;
  #ids = 0;

  constructor(
    device: Device,
    storage: Storage,
    config: UNetConfig,
    weights: WeightSource,
    work: PatchWork,
    options: PatchedOptions,
  ) {
    this.#device = device;
    this.#storage = storage;
    this.#weights = weights;
    this.#work = work;
    this.#options = options;
    this.#slots = { slotOf: (tensor) => this.#slotOf(tensor), blocks: options.blocks };
    this.#parts = new Map(
      partsOf(config).flatMap((part) =>
        ['weight', 'bias'].map((leaf): [string, Part] => [`${part.id}.${leaf}`, part]),
      ),
    );
  }

  /** GPU bytes of all copies. */
  get sizeBytes(): number {
    return [...this.#copies.values()].reduce((sum, { buffer }) => sum + buffer.size, 0);
  }

  /** Of these, what no batch binds now. */
  get idleBytes(): number {
    return [...this.#copies.values()].reduce((sum, copy) => sum + (copy.isPinned ? 0 : copy.buffer.size), 0);
  }

  /** Lets the least recently used copy go that no batch binds; false where there is none. */
  evictOne(): boolean {
    let oldest: [string, Copy] | undefined;
    for (const entry of this.#copies)
      if (!entry[1].isPinned && entry[1].lastUse < (oldest?.[1].lastUse ?? Number.POSITIVE_INFINITY))
        oldest = entry;
    if (!oldest) return false;
    this.#drop(...oldest);
    return true;
  }

  /** What the stacks patch, one per image; undefined where no adapter of theirs patches anything. */
  read(stacks: readonly (readonly StackEntry[])[]): Reading | undefined {
    const active = stacks.map((stack) => stack.filter(({ strength }) => strength !== 0));
    if (!active.some((stack) => stack.some(({ adapter }) => adapter.patches.size > 0))) return undefined;
    const byStack = new Map<string, ReadonlyMap<string, Variant>>();
    const byImage = active.map((stack) => {
      const key = stack.map(nameOf).join('+');
      const variants = byStack.get(key) ?? variantsOf(stack, this.#slots);
      byStack.set(key, variants);
      return variants;
    });
    return { byImage, stacks: active.map((stack, image) => lowRankOf(stack, byImage[image]!, this.#slots)) };
  }

  /** Makes ready what the images bind, for one batch at a time. ERR_TOO_LARGE, ERR_OUT_OF_MEMORY, ERR_GPU. */
  async open({ byImage }: Reading): Promise<Patching> {
    const variants = byImage.flatMap((found) => [...found.values()]);
    const wanted = new Map(variants.map((variant) => [variant.key, variant]));
    // Before anything is awaited: what an adapter that loads meanwhile lets go must not be what this batch binds.
    this.#pin(wanted.keys());
    const fresh: string[] = [];
    let isOpen = true;
    const close = (submitted: boolean): void => {
      if (!isOpen) return;
      isOpen = false;
      this.#work.recorder.submitted();
      for (const key of wanted.keys()) {
        const copy = this.#copies.get(key);
        if (copy) copy.isPinned = false;
        // What was never run holds nothing.
        if (copy && !submitted && fresh.includes(key)) this.#drop(key, copy);
      }
    };
    try {
      await this.#makeRoom([...wanted.values()]);
      fresh.push(...(await this.#place([...wanted.values()])));
      const bound = await this.#bind(wanted);
      const substitutes = new Map(
        [...new Set(variants.map(({ tensor }) => tensor))].map((tensor) => [
          tensor,
          byImage.map((found) => bound.get(found.get(tensor)?.key ?? '')),
        ]),
      );
      return { substitutes, close };
    } catch (error) {
      close(false);
      throw error;
    }
  }

  close(): void {
    for (const entry of this.#copies) this.#drop(...entry);
  }

  #drop(key: string, { buffer }: Copy): void {
    buffer.destroy();
    this.#copies.delete(key);
  }

  #slotOf(tensor: string): number | undefined {
    const part = this.#parts.get(tensor)!;
    return isMatrix(part) && tensor.endsWith('.weight') ? this.#weights.matrix(part.id).slot : undefined;
  }

  #pin(keys: Iterable<string>): void {
    for (const key of keys) {
      const copy = this.#copies.get(key);
      if (!copy) continue;
      copy.isPinned = true;
      copy.lastUse = ++this.#clock;
    }
  }

  /** Makes room for the copies that are not there, as far as it goes; returns the keys of those it made. */
  async #place(wanted: readonly Variant[]): Promise<readonly string[]> {
    const missing = wanted.filter(({ key }) => !this.#copies.has(key));
    const { limitBytes, spareBytes } = this.#options;
    const sizes = missing.map((variant) => this.#bytesOf(variant));
    // Leaves room for one of them in passing, which all that do not fit go through.
    const passing = Math.max(0, Math.max(0, ...sizes) - this.#work.passing.weight.sizeBytes);
    const room = Math.min(limitBytes, this.sizeBytes + spareBytes() - passing);
    let added = 0;
    const fitting = missing.filter((variant) => {
      const sizeBytes = this.#bytesOf(variant);
      const fits = (): boolean => this.sizeBytes + added + sizeBytes <= room;
      while (!fits() && this.evictOne());
      if (!fits()) return false;
      added += sizeBytes;
      return true;
    });
    if (fitting.length === 0) return [];
    const made: GPUBuffer[] = [];
    const usage = Usage.STORAGE | Usage.COPY_SRC;
    try {
      await this.#device.guarded('patched weights', () => {
        for (const variant of fitting)
          made.push(this.#device.createBuffer(variant.tensor, this.#bytesOf(variant), usage));
      });
    } catch (error) {
      for (const buffer of made) buffer.destroy();
      if (UnetdError.from(error).code === 'ERR_OUT_OF_MEMORY') return [];
      throw error;
    }
    return fitting.map(({ key }, i) => {
      const facts = { isMade: false, isPinned: true, lastUse: ++this.#clock };
      this.#copies.set(key, { id: this.#ids++, buffer: made[i]!, ...facts });
      return key;
    });
  }

  /** The substitute of each variant: its copy, or what passes through a shared buffer. */
  async #bind(wanted: ReadonlyMap<string, Variant>): Promise<ReadonlyMap<string, Substitute>> {
    for (const variant of wanted.values())
      if (!this.#copies.has(variant.key))
        await this.#options.ensure(this.#work.passing[leafOf(variant)], this.#bytesOf(variant));
    const held = { weight: '', bias: '' };
    const bound = new Map<string, Substitute>();
    for (const variant of wanted.values()) {
      const { key } = variant;
      const copy = this.#copies.get(key);
      const leaf = leafOf(variant);
      const current = (): GPUBuffer => copy?.buffer ?? this.#work.passing[leaf].buffer;
      const steps = copy?.isMade ? [] : await this.#compile(variant, current);
      const ready = (pass: GPUComputePassEncoder): void => {
        if (copy ? copy.isMade : held[leaf] === key) return;
        for (const step of steps) this.#work.recorder.record(pass, step);
        if (copy) copy.isMade = true;
        else held[leaf] = key;
      };
      bound.set(key, { id: copy?.id ?? this.#ids++, current, ready });
    }
    return bound;
  }

  /** Makes the buffers that these are worked out in as large as they need them. ERR_TOO_LARGE, ERR_OUT_OF_MEMORY. */
  async #makeRoom(variants: readonly Variant[]): Promise<void> {
    const { maxBindingBytes } = this.#device.capabilities;
    const most = new Map<WorkName, number>();
    for (const variant of variants) {
      const { key, tensor, steps } = variant;
      if (this.#copies.get(key)?.isMade || this.#slotOf(tensor) === undefined) continue;
      const need = Object.entries(needOf(shapeOf(this.#parts.get(tensor)!), steps)) as [WorkName, number][];
      const largest = Math.max(this.#bytesOf(variant), ...need.map(([, sizeBytes]) => sizeBytes));
      if (largest > maxBindingBytes)
        throw new UnetdError(
          'ERR_TOO_LARGE',
          `Patching ${tensor} takes ${largest} bytes in f32, the adapter binds at most ${maxBindingBytes}: leave out the LoRAs that change it by more than low rank`,
          { tensor, needed: largest, limit: maxBindingBytes },
        );
      for (const [name, sizeBytes] of need) most.set(name, Math.max(most.get(name) ?? 0, sizeBytes));
    }
    for (const [name, sizeBytes] of most)
      if (sizeBytes > 0) await this.#options.ensure(this.#work.arenas[name], sizeBytes);
  }

  #compile(variant: Variant, current: () => GPUBuffer): Promise<readonly Recordable[]> {
    return this.#work.recorder.compile(this.#dispatchesOf(variant, current), this.#storage);
  }

  #dispatchesOf({ tensor, steps }: Variant, current: () => GPUBuffer): readonly Dispatch[] {
    const part = this.#parts.get(tensor)!;
    const out: Resident = { kind: 'resident', label: tensor, current, offset: 0, sizeBytes: 0 };
    if (this.#slotOf(tensor) !== undefined) {
      const matrix = this.#weights.matrix(part.id);
      const { sizeBytes } = placeOf(part, matrix.format);
      return patchMatrix({ tensor, matrix, sizeBytes, steps, work: this.#work.operands(), out });
    }
    const vector = this.#weights.vector(tensor);
    if (!vector) throw new Error(`the model has no vector ${tensor}`);
    return patchVector({ tensor, length: part.outFeatures, vector, steps, out });
  }

  #bytesOf({ tensor }: Variant): number {
    const part = this.#parts.get(tensor)!;
    return this.#slotOf(tensor) === undefined
      ? storedChannels(part.outFeatures) * 4
      : placeOf(part, this.#weights.matrix(part.id).format).sizeBytes;
  }
}

const leafOf = ({ tensor }: Variant): 'weight' | 'bias' => (tensor.endsWith('.bias') ? 'bias' : 'weight');
