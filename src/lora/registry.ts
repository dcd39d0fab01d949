/**
 * The adapters of one model, by name: parsed from their files, kept on the GPU while the pool has room, let go least
 * recently used first, and read again when a forward needs one that had to go. Shared by all requests.
 */
import { existsSync } from 'node:fs';
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
export type AdapterFacts = Omit<Adapter, 'layers' | 'patches'> & { readonly layerCount: number };

interface Entry {
  readonly source: AdapterSource;
  readonly facts: AdapterFacts;
  placed: PlacedAdapter | undefined;
  /** What it takes on the GPU. */
  readonly poolBytes: number;
  lastUse: number;
  /** Leases that hold it on the GPU. */
  pins: number;
}

/** How many adapters were put on the GPU and how many had to make room for others; counted on by every registry it is given to. */
export interface AdapterTurnover {
  adapterLoads: number;
  adapterEvictions: number;
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
  readonly #makeRoom: (bytes: number) => boolean;
  readonly #turnover: AdapterTurnover;
  readonly #entries = new Map<string, Entry>();
  /** Files are read and placed one after another, so that a stack of many holds one of them in JS memory. */
  #turn: Promise<unknown> = Promise.resolve();
  #clock = 0;
  #closed = false;

  /**
   * `budgetBytes` bounds what all adapters together take on the GPU. `makeRoom` may free other memory once no adapter is
   * left to let go; false where it cannot.
   */
  constructor(
    config: UNetConfig,
    pool: AdapterPool,
    budgetBytes: number,
    makeRoom: (bytes: number) => boolean = () => false,
    turnover: AdapterTurnover = { adapterLoads: 0, adapterEvictions: 0 },
  ) {
    this.#config = config;
    this.#pool = pool;
    this.#budgetBytes = budgetBytes;
    this.#makeRoom = makeRoom;
    this.#turnover = turnover;
  }

  /** The adapters that are on the GPU now. */
  resident(): readonly { readonly lora: string; readonly sizeBytes: number }[] {
    return [...this.#entries].flatMap(([lora, { placed }]) =>
      placed ? [{ lora, sizeBytes: placed.sizeBytes }] : [],
    );
  }

  /** Parses a file and puts it on the GPU; the same version again returns at once. ERR_LORA_*, ERR_SAFETENSORS, ERR_OUT_OF_MEMORY. */
  async load(source: AdapterSource): Promise<AdapterFacts> {
    const known = this.#entries.get(source.name);
    if (known?.source.version === source.version && known.placed) return known.facts;
    const entry = await this.#inTurn(() => this.#read(source));
    this.#unpin(entry);
    return entry.facts;
  }

  /** Reads adapters that had to go, so that a forward soon need not. Holds none: they may go again. Errors as `use`. */
  async ready(names: readonly string[]): Promise<void> {
    for (const name of names) {
      const entry = this.#entries.get(name) ?? unknown(name);
      entry.lastUse = ++this.#clock;
      if (!entry.placed) this.#unpin(await this.#inTurn(() => this.#readAgain(name)));
    }
  }

  /**
   * The named adapters on the GPU, in order; one lease at a time. ERR_UNKNOWN_LORA, also where one had to be read again and
   * its file is another one by now; else as `load`.
   */
  async use(names: readonly string[]): Promise<Lease> {
    try {
      return await this.#hold(names);
    } catch (error) {
      const sizes = [...new Set(names)].map((name) => this.#entries.get(name)?.poolBytes ?? 0);
      const needed = sizes.reduce((sum, bytes) => sum + bytes, 0);
      if (UnetdError.from(error).code !== 'ERR_OUT_OF_MEMORY' || needed > this.#budgetBytes) throw error;
      // There may be room in pieces between those that were held already: in an empty pool they lie without gaps.
      while (this.#evictOne());
      return await this.#hold(names);
    }
  }

  async #hold(names: readonly string[]): Promise<Lease> {
    const held: Entry[] = [];
    const release = (): void => {
      for (const entry of held.splice(0)) this.#unpin(entry);
    };
    try {
      for (const name of names) {
        let entry = this.#entries.get(name) ?? unknown(name);
        if (entry.placed) entry.pins += 1;
        else entry = await this.#inTurn(() => this.#readAgain(name));
        entry.lastUse = ++this.#clock;
        held.push(entry);
      }
    } catch (error) {
      release();
      throw error;
    }
    return { adapters: held.map((entry) => entry.placed!), release };
  }

  /** Refuses what is being read now; the pool is closed by its owner. */
  close(): void {
    this.#closed = true;
    this.#entries.clear();
  }

  /** What `work` gives, pinned once, after the files before it. */
  #inTurn(work: () => Promise<Entry>): Promise<Entry> {
    const entry = this.#turn.then(work).then((found) => {
      found.pins += 1;
      return found;
    });
    this.#turn = entry.catch(() => {});
    return entry;
  }

  /** The adapter in a file, which takes the place of the one of its name only once it is on the GPU. */
  async #read(source: AdapterSource): Promise<Entry> {
    const { name, version } = source;
    const known = this.#entries.get(name);
    if (known?.placed && known.source.version === version) return known;
    const adapter = await openAdapter(source.path, this.#config, name);
    // The old version is the first to go if room is needed.
    if (known) known.lastUse = 0;
    return this.#enter(source, adapter);
  }

  /** An adapter that had to go, from its file. ERR_UNKNOWN_LORA where that is another one by now, or gone. */
  async #readAgain(name: string): Promise<Entry> {
    const known = this.#entries.get(name);
    if (known?.placed) return known;
    if (!known) return unknown(name);
    const { path } = known.source;
    const adapter = await openAdapter(path, this.#config, name).catch((error: unknown) => {
      if (existsSync(path)) throw error;
      return undefined;
    });
    const expected = known.facts.digest;
    if (adapter?.digest === expected) return this.#enter(known.source, adapter);
    if (adapter) this.#entries.delete(name);
    const what = adapter
      ? `has changed since it was loaded (digest ${expected}, now ${adapter.digest})`
      : 'has gone since it was loaded';
    throw new UnetdError('ERR_UNKNOWN_LORA', `The file of LoRA "${name}" ${what}; load it again`, {
      lora: name,
      expected,
      actual: adapter?.digest ?? null,
    });
  }

  async #enter(source: AdapterSource, adapter: Adapter): Promise<Entry> {
    this.#refuseClosed(source.name);
    const placed = await this.#add(adapter, source.name);
    this.#refuseClosed(source.name);
    const old = this.#entries.get(source.name);
    // Leases of the old version keep it until they end.
    if (old?.placed && old.pins === 0) this.#pool.remove(old.placed);
    const { layers: _layers, patches: _patches, ...rest } = adapter;
    const facts = { ...rest, layerCount: layersChanged(adapter) };
    const entry = { source, facts, placed, poolBytes: placed.sizeBytes, lastUse: ++this.#clock, pins: 0 };
    this.#entries.set(source.name, entry);
    this.#turnover.adapterLoads += 1;
    return entry;
  }

  /** Puts an adapter into the pool, letting others go for it. ERR_OUT_OF_MEMORY. */
  async #add(adapter: Adapter, name: string): Promise<PlacedAdapter> {
    const needed = this.#pool.bytesOf(adapter);
    if (needed <= this.#budgetBytes) {
      while (!this.#fits(needed) && this.#evictOne());
      let placed = this.#fits(needed) ? await this.#pool.add(adapter) : undefined;
      while (!placed && this.#evictOne()) placed = await this.#pool.add(adapter);
      if (!placed && this.#makeRoom(needed)) placed = await this.#pool.add(adapter);
      if (placed) return placed;
    }
    this.#refuseClosed(name);
    const used = this.resident().reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    const where =
      used + needed > this.#budgetBytes
        ? `the adapters of a model may take ${this.#budgetBytes}, and those that this batch needs beside it take ${used}`
        : `those that this batch needs beside it take ${used}, and no memory, or no buffer that the GPU can bind, has room for both`;
    throw new UnetdError(
      'ERR_OUT_OF_MEMORY',
      `LoRA "${name}" takes ${needed} bytes on the GPU; ${where}: use fewer or smaller LoRAs at once, or raise --memory-budget`,
      { lora: name, needed, used, budget: this.#budgetBytes },
    );
  }

  #refuseClosed(lora: string): void {
    if (!this.#closed) return;
    throw new UnetdError(
      'ERR_MODEL_NOT_LOADED',
      `The model was unloaded while LoRA "${lora}" was read for it; load both again`,
      { lora },
    );
  }

  #fits(needed: number): boolean {
    const held = this.resident().reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    return held + needed <= this.#budgetBytes;
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
    this.#turnover.adapterEvictions += 1;
    return true;
  }
}

/** Modules that an adapter changes anything of. */
function layersChanged({ layers, patches }: Adapter): number {
  const patched = patches.map(({ tensor }) => tensor.replace(/\.(weight|bias)$/, ''));
  return new Set([...layers.map(({ layer }) => layer), ...patched]).size;
}

function unknown(lora: string): never {
  throw new UnetdError('ERR_UNKNOWN_LORA', `LoRA "${lora}" is not loaded; load it first`, { lora });
}
