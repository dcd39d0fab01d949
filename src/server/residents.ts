/**
 * What the engine holds: which models and adapters are loaded, from which version of their files, and how many requests use
 * each model. Loads on demand and only once for any number of askers. Runs no forwards.
 */
import type { AdapterInfo, EngineApi, FileSource, ModelInfo, Progress } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';
import { StorageClaims } from './claims.ts';
import type { Clock } from './clock.ts';
import type { FileKind } from './folders.ts';
import type { Library } from './library.ts';
import type { DtypeChoice } from './protocol.ts';
import { Tally } from './tally.ts';

/** How long a LoRA file is taken as unchanged without looking again. */
const RECHECK_MS = 1000;

interface ResidentAdapter {
  readonly info: AdapterInfo;
  readonly version: string;
  readonly checkedAt: number;
}

/** A request to load a model. */
export interface Asker {
  readonly owner: string;
  readonly progress: Progress;
  /** Aborts when the request is cancelled, or its connection ends. */
  readonly signal: AbortSignal;
}

interface Loading {
  readonly dtype: DtypeChoice;
  readonly done: Promise<ModelInfo>;
  /** Each with the dtype that it named itself. */
  readonly askers: Map<Asker, DtypeChoice>;
}

export class Residents {
  readonly #engine: EngineApi;
  readonly #library: Library;
  readonly #clock: Clock;
  readonly #defaultDtype: DtypeChoice;
  readonly #models = new Map<string, ModelInfo>();
  readonly #loading = new Map<string, Loading>();
  readonly #claims = new StorageClaims();
  /** `model/NAME` or `lora/NAME` -> requests. */
  readonly #uses = new Tally();
  /** Model -> LoRA -> adapter. */
  readonly #adapters = new Map<string, Map<string, ResidentAdapter>>();
  readonly #adapterLoading = new Map<string, Promise<AdapterInfo>>();

  constructor(engine: EngineApi, library: Library, clock: Clock, defaultDtype: DtypeChoice) {
    this.#engine = engine;
    this.#library = library;
    this.#clock = clock;
    this.#defaultDtype = defaultDtype;
  }

  model(name: string): ModelInfo | undefined {
    return this.#models.get(name);
  }

  /**
   * Whether a file may have to be read soon: that of a model which is loaded, or of a LoRA which a request names that waits
   * or runs. Every LoRA that was ever loaded would be too many: an upload quota would fill for good.
   */
  isNeeded(kind: FileKind, name: string): boolean {
    if (kind === 'model') return this.#models.has(name) || this.#loading.has(name);
    const loading = [...this.#adapterLoading.keys()].some((key) => key.endsWith(`\n${name}`));
    return loading || this.#uses.of(`lora/${name}`) > 0;
  }

  /**
   * Loads a model as `model.load` does: anew where its file has changed, or another dtype is asked for than it is loaded in.
   * ERR_MODEL_BUSY where requests use it then, or another connection has asked for it in another dtype.
   */
  async loadModel(name: string, dtype: DtypeChoice = 'auto', asker?: Asker): Promise<ModelInfo> {
    const source = await this.#library.find('model', name);
    for (;;) {
      const running = this.#loading.get(name);
      if (running === undefined) break;
      if (dtype === 'auto' || running.dtype === dtype) return this.#follow(running, dtype, asker);
      await running.done.catch(() => {});
    }
    // Nothing is awaited from here on: what is decided holds when it is done.
    asker?.signal.throwIfAborted();
    if (dtype !== 'auto' && asker !== undefined) this.#claims.check(name, asker.owner, dtype);
    const loaded = this.#models.get(name);
    if (loaded?.version === source.version && (dtype === 'auto' || loaded.dtype === dtype)) {
      this.#claim(name, dtype, asker);
      return loaded;
    }
    if (loaded !== undefined) this.#refuseBusy(name, 'loaded anew');
    const wanted = dtype === 'auto' ? (this.#claims.of(name) ?? this.#defaultDtype) : dtype;
    const { path, version } = source;
    return this.#follow(this.#load({ name, path, version }, wanted), dtype, asker);
  }

  /** The model, loaded first where it is not. */
  async needModel(name: string): Promise<ModelInfo> {
    return this.#models.get(name) ?? this.loadModel(name);
  }

  /** The connection no longer insists on a dtype either. ERR_MODEL_BUSY, ERR_MODEL_NOT_LOADED. */
  async unloadModel(name: string, owner: string): Promise<void> {
    if (!this.#models.has(name)) {
      await this.#library.find('model', name);
      throw new UnetdError(
        'ERR_MODEL_NOT_LOADED',
        `Model "${name}" is not loaded: there is nothing to unload.`,
        { model: name },
      );
    }
    this.#refuseBusy(name, 'unloaded');
    this.#claims.drop(name, owner);
    this.forget(name);
    await this.#engine.unloadModel(name);
  }

  /** The adapter, loaded first where it is not, or where its file has changed. Loads the model too if need be. */
  async needAdapter(lora: string, model: string): Promise<AdapterInfo> {
    await this.needModel(model);
    const held = this.#adapters.get(model)?.get(lora);
    if (held !== undefined && this.#clock.now() - held.checkedAt < RECHECK_MS) return held.info;
    const source = await this.#library.find('lora', lora);
    if (held !== undefined && held.version === source.version) {
      this.#adapters.get(model)?.set(lora, { ...held, checkedAt: this.#clock.now() });
      return held.info;
    }
    const key = `${model}\n${lora}`;
    const running = this.#adapterLoading.get(key);
    if (running !== undefined) return running;
    const { path, version } = source;
    const done = this.#loadAdapter({ name: lora, path, version }, model).then((info) => {
      const adapters = this.#adapters.get(model) ?? new Map<string, ResidentAdapter>();
      this.#adapters.set(model, adapters.set(lora, { info, version, checkedAt: this.#clock.now() }));
      return info;
    });
    this.#adapterLoading.set(key, done);
    done.finally(() => this.#adapterLoading.delete(key)).catch(() => {});
    return done;
  }

  /** Counts a request as using the model and the LoRAs until the result is called. */
  use(model: string, loras: readonly string[] = []): () => void {
    const keys = [`model/${model}`, ...loras.map((lora) => `lora/${lora}`)];
    return this.#uses.add(keys);
  }

  /** A connection has ended: what it asked for binds nobody any more. */
  dropOwner(owner: string): void {
    this.#claims.dropOwner(owner);
  }

  /** Makes the next use load the model and its adapters again: the engine no longer has them. */
  forget(model: string): void {
    this.#models.delete(model);
    this.#adapters.delete(model);
  }

  /** Makes the next use load the adapter again. */
  forgetAdapter(model: string, lora: string): void {
    this.#adapters.get(model)?.delete(lora);
  }

  /** An engine short of memory may have dropped the model meanwhile: then it is loaded again. */
  async #loadAdapter(source: FileSource, model: string): Promise<AdapterInfo> {
    try {
      return await this.#engine.loadAdapter(source, model);
    } catch (error) {
      if (UnetdError.from(error).code !== 'ERR_MODEL_NOT_LOADED') throw error;
      this.forget(model);
      await this.needModel(model);
      return this.#engine.loadAdapter(source, model);
    }
  }

  async #arrived(info: ModelInfo): Promise<ModelInfo> {
    // Adapters belong to the weights they were loaded for.
    this.#adapters.delete(info.model);
    this.#models.set(info.model, info);
    // The engine may have dropped idle models to make room.
    const stats = await this.#engine.stats().catch(() => null);
    const held = new Set(stats?.models.map(({ model }) => model));
    if (stats !== null) for (const name of [...this.#models.keys()]) if (!held.has(name)) this.forget(name);
    return info;
  }

  #load(source: FileSource, dtype: DtypeChoice): Loading {
    const { name } = source;
    const askers: Loading['askers'] = new Map();
    const report: Progress = (stage, done, total) => {
      for (const { progress } of askers.keys()) progress(stage, done, total);
    };
    const done = this.#engine.loadModel(source, dtype, report).then((info) => {
      for (const [asker, named] of askers) this.#claim(name, named, asker);
      return this.#arrived(info);
    });
    const loading = { dtype, done, askers };
    this.#loading.set(name, loading);
    done.finally(() => this.#loading.delete(name)).catch(() => {});
    return loading;
  }

  #follow({ done, askers }: Loading, dtype: DtypeChoice, asker: Asker | undefined): Promise<ModelInfo> {
    if (asker === undefined) return done;
    askers.set(asker, dtype);
    return done.finally(() => askers.delete(asker));
  }

  #claim(model: string, dtype: DtypeChoice, asker: Asker | undefined): void {
    if (asker === undefined || asker.signal.aborted || dtype === 'auto') return;
    this.#claims.set(model, asker.owner, dtype);
  }

  #refuseBusy(name: string, what: string): void {
    const uses = this.#uses.of(`model/${name}`);
    if (uses === 0) return;
    throw new UnetdError(
      'ERR_MODEL_BUSY',
      `Model "${name}" cannot be ${what} while ${uses} requests use it; retry when they are answered.`,
      {
        model: name,
        requests: uses,
      },
    );
  }
}
