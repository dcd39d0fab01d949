/**
 * The adapters of one model, by name: parsed from their files, kept on the GPU while the pool has room, let go least
 * recently used first, and read again when a forward needs one that had to go. Shared by all requests.
 */
import { UnetdError } from '../errors.ts';
import type { UNetConfig } from '../unet/config.ts';
import { type Adapter, openAdapter } from './adapter.ts';
import type { AdapterPool, PlacedAdapter } from './pool.ts';

/** A file with an adapter; `version` changes when the file does. */
export interface AdapterSource {
  readonly name: string;
  readonly path: string;
  readonly version: string;
}

/** What is known of an adapter without its matrices. */
export type LoraFacts = Omit<Adapter, 'layers'> & { readonly layerCount: number };

interface Entry {
  readonly source: AdapterSource;
  readonly facts: LoraFacts;
  placed: PlacedAdapter | undefined;
  lastUse: number;
  /** Leases that hold it on the GPU. */
  pins: number;
}

/** Adapters held on the GPU until `release`, which a forward calls once its work is submitted. */
export interface Lease {
  readonly adapters: readonly PlacedAdapter[];
  readonly release: () => void;
}

export class AdapterRegistry {
  readonly #config: UNetConfig;
  readonly #pool: AdapterPool;
  readonly #budgetBytes: number;
  readonly #entries = new Map<string, Entry>();
  #clock = 0;

  /** `budgetBytes` bounds what all adapters together take on the GPU. */
  constructor(config: UNetConfig, pool: AdapterPool, budgetBytes: number) {
    this.#config = config;
    this.#pool = pool;
    this.#budgetBytes = budgetBytes;
  }

  /** The adapters that are on the GPU now. */
  resident(): readonly { readonly lora: string; readonly sizeBytes: number }[] {
    return [...this.#entries].flatMap(([lora, { placed }]) =>
      placed ? [{ lora, sizeBytes: placed.sizeBytes }] : [],
    );
  }

  /** Parses a file and puts it on the GPU; the same version again returns at once. ERR_LORA_*, ERR_SAFETENSORS, ERR_OUT_OF_MEMORY. */
  async load(source: AdapterSource): Promise<LoraFacts> {
    const known = this.#entries.get(source.name);
    if (known?.source.version === source.version && known.placed) return known.facts;
    return (await this.#place(source)).facts;
  }

  /** The named adapters on the GPU, in order. ERR_UNKNOWN_LORA, and as `load` where one has to be read again. */
  async use(names: readonly string[]): Promise<Lease> {
    const held: Entry[] = [];
    const release = (): void => {
      for (const entry of held.splice(0)) this.#unpin(entry);
    };
    try {
      for (const name of names) {
        let entry = this.#entries.get(name);
        if (!entry)
          throw new UnetdError('ERR_UNKNOWN_LORA', `LoRA "${name}" is not loaded; load it first`, {
            lora: name,
          });
        if (!entry.placed) entry = await this.#place(entry.source);
        entry.pins += 1;
        entry.lastUse = ++this.#clock;
        held.push(entry);
      }
    } catch (error) {
      release();
      throw error;
    }
    return { adapters: held.map((entry) => entry.placed!), release };
  }

  async #place(source: AdapterSource): Promise<Entry> {
    const adapter = await openAdapter(source.path, this.#config);
    this.#forget(source.name);
    const needed = this.#pool.bytesOf(adapter);
    let placed = this.#fits(needed) ? this.#pool.add(adapter) : undefined;
    while (!placed && this.#evictOne()) placed = this.#fits(needed) ? this.#pool.add(adapter) : undefined;
    if (!placed)
      throw new UnetdError(
        'ERR_OUT_OF_MEMORY',
        `LoRA "${source.name}" takes ${needed} bytes on the GPU; adapters may take ${this.#budgetBytes} in all, and none that is not in use is left to make room`,
        { needed, budget: this.#budgetBytes },
      );
    const { layers, ...rest } = adapter;
    const facts = { ...rest, layerCount: layers.length };
    const entry = { source, facts, placed, lastUse: ++this.#clock, pins: 0 };
    this.#entries.set(source.name, entry);
    return entry;
  }

  #fits(needed: number): boolean {
    const held = this.resident().reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    return held + needed <= this.#budgetBytes;
  }

  /** Makes room for a new version of an adapter; leases of the old one keep it until they end. */
  #forget(name: string): void {
    const entry = this.#entries.get(name);
    this.#entries.delete(name);
    if (entry?.placed && entry.pins === 0) this.#pool.remove(entry.placed);
  }

  #unpin(entry: Entry): void {
    entry.pins -= 1;
    const replaced = this.#entries.get(entry.source.name) !== entry;
    if (replaced && entry.pins === 0 && entry.placed) this.#pool.remove(entry.placed);
  }

  /** Lets the least recently used adapter go that no lease holds; false where there is none. */
  #evictOne(): boolean {
    let oldest: Entry | undefined;
    for (const entry of this.#entries.values())
      if (entry.placed && entry.pins === 0 && entry.lastUse < (oldest?.lastUse ?? Number.POSITIVE_INFINITY))
        oldest = entry;
    if (!oldest?.placed) return false;
    this.#pool.remove(oldest.placed);
    oldest.placed = undefined;
    return true;
  }
}
