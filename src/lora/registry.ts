/**
 * The adapters of one model, by name: parsed from their files, put on the GPU (`shelf.ts`), and read again when a forward needs
 * one that had to go. Files with the same tensors are one adapter there, whatever their names. Shared by all requests.
 */
import { existsSync } from 'node:fs';
import { UnetdError } from '../errors.ts';
import type { UNetConfig } from '../unet/config.ts';
import { type Adapter, openAdapter } from './adapter.ts';
import type { AdapterPool, PlacedAdapter } from './pool.ts';
import { type Content, noRoom, Shelf, type ShelfOptions } from './shelf.ts';

/** A file with an adapter; `version` changes when the file does. */
export interface AdapterSource {
  readonly name: string;
  readonly path: string;
  readonly version: string;
}

/** What is known of an adapter without its matrices. */
export type AdapterFacts = Omit<Adapter, 'layers' | 'patches'> & { readonly layerCount: number };

interface Entry {
  readonly source: AdapterSource;
  readonly facts: AdapterFacts;
  /** What it takes on the GPU. */
  readonly poolBytes: number;
}

/** Adapters held on the GPU until `release`, which a forward calls once its work is submitted. */
export interface Lease {
  readonly adapters: readonly PlacedAdapter[];
  readonly release: () => void;
}

type Turns = <Value>(work: () => Promise<Value>) => Promise<Value>;

export class AdapterRegistry {
  readonly #config: UNetConfig;
  readonly #shelf: Shelf;
  readonly #budgetBytes: number;
  readonly #entries = new Map<string, Entry>();
  /** Loads come one after another, so that many of them hold one adapter in JS memory. */
  readonly #loading: Turns = oneByOne();
  /** What changes the shelf does so alone: a load, once the leases leave it room, or a lease, until it has all that it names. */
  readonly #placing: Turns = oneByOne();

  constructor(config: UNetConfig, pool: AdapterPool, options: ShelfOptions) {
    this.#config = config;
    this.#shelf = new Shelf(pool, options);
    this.#budgetBytes = options.budgetBytes;
  }

  /** The adapters that are on the GPU now; of several names for one adapter, the first has its bytes. */
  resident(): readonly { readonly lora: string; readonly sizeBytes: number }[] {
    const seen = new Set<string>();
    return [...this.#entries].flatMap(([lora, { facts, poolBytes }]) => {
      if (!this.#shelf.has(facts.digest)) return [];
      const sizeBytes = seen.has(facts.digest) ? 0 : poolBytes;
      seen.add(facts.digest);
      return [{ lora, sizeBytes }];
    });
  }

  /**
   * Parses a file and puts it on the GPU; the same version again returns at once. Waits for a lease that leaves it no room.
   * ERR_LORA_*, ERR_SAFETENSORS, ERR_OUT_OF_MEMORY.
   */
  async load(source: AdapterSource): Promise<AdapterFacts> {
    return this.#loaded(source) ?? this.#loading(async () => this.#loaded(source) ?? this.#load(source));
  }

  /** Reads adapters that had to go, so that a forward soon need not. Holds none: they may go again. Errors as `use` and `load`. */
  async ready(names: readonly string[]): Promise<void> {
    for (const name of names)
      if (!this.#resident(name))
        await this.#loading(async () => {
          if (!this.#resident(name)) await this.#placeBesideLeases(await this.#openAgain(name), name);
        });
  }

  /**
   * The named adapters on the GPU, in order; one lease at a time. ERR_UNKNOWN_LORA, also where one had to be read again and
   * its file is another one by now; ERR_OUT_OF_MEMORY where they do not fit together; else as `load`.
   */
  async use(names: readonly string[]): Promise<Lease> {
    this.#refuseTooMany(names);
    if (names.every((name) => this.#resident(name))) return this.#hold(names);
    return this.#placing(async () => {
      try {
        return await this.#hold(names);
      } catch (error) {
        if (UnetdError.from(error).code !== 'ERR_OUT_OF_MEMORY') throw error;
        // There may be room in pieces between those that were there already: in an empty pool they lie without gaps.
        while (this.#shelf.evictOne());
        return await this.#hold(names);
      }
    });
  }

  /** Refuses what is being read now; the pool is closed by its owner. */
  close(): void {
    this.#entries.clear();
    this.#shelf.close();
  }

  #entry(name: string): Entry {
    const entry = this.#entries.get(name);
    if (entry) return entry;
    throw new UnetdError('ERR_UNKNOWN_LORA', `LoRA "${name}" is not loaded; load it first`, { lora: name });
  }

  /** The adapter of a name where it is on the GPU, marked as used. */
  #resident(name: string): Content | undefined {
    return this.#shelf.get(this.#entry(name).facts.digest);
  }

  #loaded({ name, version }: AdapterSource): AdapterFacts | undefined {
    const known = this.#entries.get(name);
    return known?.source.version === version && this.#resident(name) ? known.facts : undefined;
  }

  /** The adapter in a file, which takes the place of the one of its name only once it is on the GPU. */
  async #load(source: AdapterSource): Promise<AdapterFacts> {
    const { name, path } = source;
    const adapter = await openAdapter(path, this.#config, name);
    // The old version is the first to go if room is needed.
    const old = this.#entries.get(name)?.facts.digest;
    if (old !== undefined) this.#shelf.age(old);
    const { placed } = await this.#placeBesideLeases(adapter, name);
    const { layers: _layers, patches: _patches, ...rest } = adapter;
    const facts = { ...rest, layerCount: layersChanged(adapter) };
    this.#entries.set(name, { source, facts, poolBytes: placed.sizeBytes });
    return facts;
  }

  /** An adapter that had to go, from its file. ERR_UNKNOWN_LORA where that is another one by now, or gone. */
  async #openAgain(name: string): Promise<Adapter> {
    const known = this.#entry(name);
    const { path } = known.source;
    const adapter = await openAdapter(path, this.#config, name).catch((error: unknown) => {
      if (existsSync(path)) throw error;
      return undefined;
    });
    const expected = known.facts.digest;
    if (adapter?.digest === expected) return adapter;
    // Meanwhile the new file may have been loaded.
    if (adapter && this.#entries.get(name) === known) this.#entries.delete(name);
    const what = adapter
      ? `has changed since it was loaded (digest ${expected}, now ${adapter.digest})`
      : 'has gone since it was loaded';
    throw new UnetdError('ERR_UNKNOWN_LORA', `The file of LoRA "${name}" ${what}; load it again`, {
      lora: name,
      expected,
      actual: adapter?.digest ?? null,
    });
  }

  /** Places an adapter. A lease that leaves it no room has all that it names, so it ends without waiting for this. */
  #placeBesideLeases(adapter: Adapter, name: string): Promise<Content> {
    return this.#placing(async () => {
      for (;;) {
        const content = await this.#shelf.place(adapter, name);
        if (content) return content;
        await this.#shelf.unpinned();
      }
    });
  }

  /** Holds adapters, and reads those that are not there: then only where nothing else changes the shelf. */
  async #hold(names: readonly string[]): Promise<Lease> {
    const held: Content[] = [];
    const release = (): void => {
      for (const content of held.splice(0)) this.#shelf.unpin(content);
    };
    try {
      for (const name of names) {
        const content = this.#resident(name) ?? (await this.#placeAgain(name));
        this.#shelf.pin(content);
        held.push(content);
      }
    } catch (error) {
      release();
      throw error;
    }
    return { adapters: held.map(({ placed }) => placed), release };
  }

  async #placeAgain(name: string): Promise<Content> {
    const adapter = await this.#openAgain(name);
    const content = await this.#shelf.place(adapter, name);
    if (!content) throw this.#shelf.noRoom(adapter, name);
    return content;
  }

  /** Refuses adapters that can never be there together, before others go for them in vain. */
  #refuseTooMany(names: readonly string[]): void {
    const seen = new Set<string>();
    let used = 0;
    for (const name of names) {
      const { facts, poolBytes } = this.#entry(name);
      if (seen.has(facts.digest)) continue;
      if (used + poolBytes > this.#budgetBytes) throw noRoom(name, poolBytes, used, this.#budgetBytes);
      seen.add(facts.digest);
      used += poolBytes;
    }
  }
}

/** Runs what it is given one after another. */
function oneByOne(): Turns {
  let last: Promise<unknown> = Promise.resolve();
  return (work) => {
    const result = last.then(work);
    last = result.catch(() => {});
    return result;
  };
}

/** Modules that an adapter changes anything of. */
function layersChanged({ layers, patches }: Adapter): number {
  const patched = patches.map(({ tensor }) => tensor.replace(/\.(weight|bias)$/, ''));
  return new Set([...layers.map(({ layer }) => layer), ...patched]).size;
}
