/**
 * The engine in this process: owns the device and the loaded models, runs forwards one after another. No sockets, no queue; the
 * server runs it in a process of its own (`process.ts`), a library user may create one directly.
 */
import { totalmem } from 'node:os';
import { UnetdError } from '../errors.ts';
import { Arena } from '../gpu/arena.ts';
import { Device } from '../gpu/device.ts';
import type { Choices, Decision, Storage } from '../gpu/kernel.ts';
import type { Timing } from '../gpu/plan.ts';
import { Readback } from '../gpu/readback.ts';
import { Stopwatch } from '../gpu/stopwatch.ts';
import { storageOf } from '../kernels/panel.ts';
import { PatchWork } from '../lora/work.ts';
import { SafetensorsFile } from '../safetensors.ts';
import type { UNetConfig } from '../unet/config.ts';
import { weightBytes } from '../unet/packed.ts';
import { Weights } from '../unet/weights.ts';
import { feedsOf, outsOf, shapeOf } from './batch.ts';
import { Budget, type MemoryUse } from './budget.ts';
import { checkBatch, checkStep, imagesOf } from './check.ts';
import { type Held, HeldModels } from './held.ts';
import { inspectModel } from './inspect.ts';
import { LoadedModel } from './model.ts';
import { type TunedFor, tunedChoices, tunedFor } from './tuning.ts';
import { Turns } from './turns.ts';
import {
  type AdapterInfo,
  type Batch,
  type BatchResult,
  type DeviceInfo,
  type EngineApi,
  type EngineOptions,
  type EngineStats,
  type FileSource,
  type ModelInfo,
  type Progress,
  STORAGE_CHOICES,
  type StorageDtype,
} from './types.ts';

/** Most bytes of adapters per model, and their share of the budget. */
const MAX_POOL_BYTES = 4 * 1024 ** 3;
const POOL_SHARE = 0.25;
/** A software adapter's memory is the machine's: leave it some. */
const SOFTWARE_SHARE = 0.75;
/** What takes less memory than a storage. */
const SMALLER: Readonly<Record<StorageDtype, StorageDtype | undefined>> = {
  f32: 'f16',
  f16: 'q8_0',
  q8_0: undefined,
};

export class Engine implements EngineApi {
  readonly device: DeviceInfo;
  readonly #device: Device;
  readonly #arena: Arena;
  readonly #scratch: Arena;
  readonly #work: PatchWork;
  readonly #stopwatch: Stopwatch | undefined;
  readonly #readback: Readback;
  readonly #options: EngineOptions;
  readonly #choices: Choices | undefined;
  readonly #budget: Budget;
  readonly #models = new HeldModels();
  readonly #turnover = { modelLoads: 0, modelEvictions: 0, adapterLoads: 0, adapterEvictions: 0 };
  #forwards = 0;
  #images = 0;
  #gpuMs = 0;
  readonly #turns = new Turns();
  /** The load in progress; models are loaded one after another. */
  #loading: Promise<unknown> = Promise.resolve();

  private constructor(device: Device, options: EngineOptions) {
    this.#device = device;
    this.#options = options;
    const { name, backend, features } = device.adapter;
    this.#choices = tunedChoices(device.adapter, options.tuning);
    const tuned = this.#choices && { tuned: this.#choices.size };
    this.device = { name, backend, features, ...tuned };
    this.#arena = new Arena(device, 'arena');
    this.#scratch = new Arena(device, 'lora scratch');
    this.#work = new PatchWork(device);
    this.#stopwatch = Stopwatch.of(device);
    this.#readback = new Readback(device);
    const most = device.capabilities.software ? totalmem() * SOFTWARE_SHARE : Number.MAX_SAFE_INTEGER;
    this.#budget = new Budget({
      limitBytes: options.memoryBudgetBytes ?? Math.floor(most),
      use: () => this.#memory(),
      idleBytes: () => this.#models.idleBytes,
      evict: () => this.#evict(),
    });
  }

  /** Opens the adapter. ERR_NO_ADAPTER. */
  static async create(options: EngineOptions = {}): Promise<Engine> {
    const { adapter, maxBindingBytes } = options;
    return new Engine(await Device.open({ adapter, maxBindingBytes }), options);
  }

  loadModel(
    source: FileSource,
    dtype: 'auto' | StorageDtype,
    progress: Progress = () => {},
  ): Promise<ModelInfo> {
    const loading = this.#loading.then(() => this.#load(source, dtype, progress));
    this.#loading = loading.catch(() => {});
    return loading;
  }

  async unloadModel(model: string): Promise<void> {
    const { model: loaded } = this.#models.get(model);
    this.#models.remove(model);
    // Forwards on their way keep its buffers until they are done.
    await this.#turns.done();
    loaded.close();
  }

  async loadAdapter(source: FileSource, model: string): Promise<AdapterInfo> {
    const facts = await this.#using(model, (held) => held.model.adapters.load(source));
    this.#budget.notePeak();
    return {
      digest: facts.digest,
      format: facts.format,
      rank: facts.rank,
      layers: facts.layerCount,
      matched: facts.matched.length,
      unmatched: facts.unmatched,
      textEncoder: facts.textEncoder,
      sizeBytes: facts.sizeBytes,
    };
  }

  readyAdapters(model: string, loras: readonly string[]): Promise<void> {
    return this.#using(model, (held) => held.model.adapters.ready(loras));
  }

  forward(batch: Batch): Promise<BatchResult> {
    return this.#using(batch.model, (held) =>
      this.#turns.take((submitted) => this.#forward(held, batch, submitted)),
    );
  }

  /** Timestamps of each dispatch of one forward of the batch. */
  profile(batch: Batch): Promise<readonly Timing[]> {
    return this.#using(batch.model, (held) =>
      this.#turns.take(() => {
        const { model, requests, config, loras } = this.#prepare(held, batch);
        return model.profile(shapeOf(requests), feedsOf(config, model.storage, requests), loras);
      }),
    );
  }

  /** What the kernels of a forward of the batch are chosen among. */
  decisions(batch: Batch): Promise<readonly Decision[]> {
    return this.#using(batch.model, (held) =>
      this.#turns.take(() => {
        const { model, requests } = this.#prepare(held, batch);
        return model.decisions(shapeOf(requests));
      }),
    );
  }

  /** What choices that are measured with this engine hold for. */
  get tunedFor(): TunedFor {
    return tunedFor(this.#device.adapter);
  }

  /** Runs a loaded model with these choices from now on, in place of what is known of the device. */
  async choose(model: string, choices: Choices): Promise<void> {
    await this.#turns.done();
    this.#models.get(model).model.choose(choices);
  }

  async stats(): Promise<EngineStats> {
    const models = this.#models.all().map(({ info: { config: _, ...info }, model }) => ({
      ...info,
      adapters: model.adapters.resident(),
    }));
    this.#budget.notePeak();
    const { limitBytes: budgetBytes, peakBytes } = this.#budget;
    return {
      device: this.device,
      memory: { budgetBytes, adapterBudgetBytes: this.#poolBytes, ...this.#memory(), peakBytes },
      models,
      turnover: { ...this.#turnover },
      forwards: this.#forwards,
      images: this.#images,
      gpuMs: this.#gpuMs,
    };
  }

  async close(): Promise<void> {
    await this.#turns.done();
    this.#models.close();
    this.#arena.close();
    this.#scratch.close();
    this.#work.close();
    this.#stopwatch?.close();
    this.#readback.close();
    this.#device.close();
  }

  /** Reads back every weight buffer of a model, for proving that nothing writes to them. */
  async readWeights(model: string): Promise<readonly Uint8Array[]> {
    const all: Uint8Array[] = [];
    for (const buffer of this.#models.get(model).model.weights.buffers())
      all.push(await this.#device.read(buffer, 0, buffer.size));
    return all;
  }

  async #load(source: FileSource, dtype: 'auto' | StorageDtype, progress: Progress): Promise<ModelInfo> {
    const { name, version } = source;
    const stored = this.#storedAs(dtype);
    const held = this.#models.find(name);
    if (held && held.info.version === version && (dtype === 'auto' || held.info.dtype === stored))
      return held.info;
    const file = await SafetensorsFile.open(source.path);
    try {
      const { config, entryOf } = inspectModel(name, file);
      // A file that is no model leaves the one of that name as it was.
      if (held) await this.unloadModel(name);
      const sizeBytes = weightBytes(config, stored, this.#device.capabilities);
      const smaller = SMALLER[stored];
      const cure = smaller ? `load it as ${smaller}, or raise --memory-budget` : 'raise --memory-budget';
      this.#budget.demand(`The weights of model "${name}" in ${stored}`, sizeBytes, 0, cure);
      const release = this.#budget.reserve(sizeBytes);
      try {
        const weights = await Weights.load(this.#device, stored, config, file, entryOf, (done, total) =>
          progress('weights', done, total),
        );
        const info = { model: name, version, dtype: stored, config, sizeBytes: weights.sizeBytes };
        const model = this.#modelOf(config, storageOf(stored), weights);
        this.#models.add(info, model);
        this.#turnover.modelLoads += 1;
        return info;
      } finally {
        release();
      }
    } finally {
      await file.close();
    }
  }

  #modelOf(config: UNetConfig, storage: Storage, weights: Weights): LoadedModel {
    const shared = {
      device: this.#device,
      arena: this.#arena,
      scratch: this.#scratch,
      work: this.#work,
      budget: this.#budget,
      stopwatch: this.#stopwatch,
      readback: this.#readback,
      turnover: this.#turnover,
      choices: this.#choices,
    };
    return new LoadedModel(shared, config, storage, weights, this.#poolBytes);
  }

  /** Most bytes of the adapters of one model. */
  get #poolBytes(): number {
    const share = Math.min(MAX_POOL_BYTES, this.#budget.limitBytes * POOL_SHARE);
    return Math.floor(this.#options.adapterBudgetBytes ?? share);
  }

  /** Keeps the model from being let go while `work` waits or runs. ERR_MODEL_NOT_LOADED. */
  async #using<T>(model: string, work: (held: Held) => Promise<T>): Promise<T> {
    const held = this.#models.get(model);
    held.uses += 1;
    try {
      return await work(held);
    } finally {
      held.uses -= 1;
    }
  }

  async #forward(held: Held, batch: Batch, submitted: () => void): Promise<BatchResult> {
    const { model, requests, config, loras } = this.#prepare(held, batch);
    const shape = shapeOf(requests);
    const most = this.#options.maxBatch ?? Number.POSITIVE_INFINITY;
    if (shape.images > most)
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `The batch holds ${shape.images} images, this engine takes at most ${most}; send fewer per request`,
        { images: shape.images, limit: most },
      );
    const { out, gpuMs } = await model.forward(
      shape,
      feedsOf(config, model.storage, requests),
      loras,
      submitted,
    );
    this.#forwards += 1;
    this.#images += shape.images;
    this.#gpuMs += gpuMs;
    this.#budget.notePeak();
    return { outs: outsOf(config, requests, out), gpuMs };
  }

  #prepare(held: Held, { model: name, requests: given }: Batch) {
    this.#models.touch(held);
    const { config } = held.info;
    const requests = given.map((request) => checkStep(config, request, name));
    checkBatch(requests);
    const loras = requests.flatMap((request) =>
      Array.from({ length: imagesOf(request) }, () => request.loras),
    );
    return { model: held.model, requests, config, loras };
  }

  #storedAs(dtype: 'auto' | StorageDtype): StorageDtype {
    const wanted = this.#options.forceDtype ?? dtype;
    if (!STORAGE_CHOICES.includes(wanted))
      throw new UnetdError(
        'ERR_BAD_DTYPE',
        `Storage "${wanted}" is not supported; ask for one of ${STORAGE_CHOICES.join(', ')}`,
        { dtype: wanted },
      );
    return wanted === 'auto' ? 'f16' : wanted;
  }

  #evict(): boolean {
    if (this.#models.evictPatched()) return true;
    const isGone = this.#models.evictModel();
    if (isGone) this.#turnover.modelEvictions += 1;
    return isGone;
  }

  #memory(): MemoryUse {
    const { weightBytes, adapterBytes } = this.#models;
    return {
      weightBytes,
      adapterBytes,
      arenaBytes: this.#arena.sizeBytes + this.#scratch.sizeBytes + this.#work.sizeBytes,
    };
  }
}
