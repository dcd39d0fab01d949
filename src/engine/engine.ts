/**
 * The engine in this process: owns the device and the loaded models, runs forwards one after another. No sockets, no queue; the
 * server runs it in a process of its own (`process.ts`), a library user may create one directly.
 */
import { totalmem } from 'node:os';
import { UnetdError } from '../errors.ts';
import { Arena } from '../gpu/arena.ts';
import { Device } from '../gpu/device.ts';
import type { Choices, Decision } from '../gpu/kernel.ts';
import type { Timing } from '../gpu/plan.ts';
import { Readback } from '../gpu/readback.ts';
import { Stopwatch } from '../gpu/stopwatch.ts';
import { PatchWork } from '../lora/work.ts';
import { feedsOf, outsOf, shapeOf } from './batch.ts';
import { Budget, type MemoryUse } from './budget.ts';
import { checkBatch, checkStep, imagesOf } from './check.ts';
import { type Held, HeldModels } from './held.ts';
import { Loader } from './loader.ts';
import type { Shared } from './model.ts';
import { type TunedFor, tunedChoices, tunedFor } from './tuning.ts';
import { Turns } from './turns.ts';
import type {
  AdapterInfo,
  Batch,
  BatchResult,
  DeviceInfo,
  EngineApi,
  EngineOptions,
  EngineStats,
  FileSource,
  ModelInfo,
  Progress,
  StorageDtype,
} from './types.ts';

/** Most bytes of adapters per model, and their share of the budget. */
const MAX_POOL_BYTES = 4 * 1024 ** 3;
const POOL_SHARE = 0.25;
/** A software adapter's memory is the machine's: leave it some. */
const SOFTWARE_SHARE = 0.75;
export class Engine implements EngineApi {
  readonly device: DeviceInfo;
  readonly #device: Device;
  readonly #options: EngineOptions;
  readonly #budget: Budget;
  readonly #shared: Shared;
  readonly #models = new HeldModels();
  readonly #loader: Loader;
  /** Most bytes of the adapters of one model. */
  readonly #poolBytes: number;
  readonly #turnover = { modelLoads: 0, modelEvictions: 0, adapterLoads: 0, adapterEvictions: 0 };
  #forwards = 0;
  #images = 0;
  #gpuMs = 0;
  readonly #turns = new Turns();

  private constructor(device: Device, options: EngineOptions) {
    this.#device = device;
    this.#options = options;
    const { name, backend, features } = device.adapter;
    const choices = tunedChoices(device.adapter, options.tuning);
    this.device = { name, backend, features, ...(choices && { tuned: choices.size }) };
    const most = device.capabilities.software ? totalmem() * SOFTWARE_SHARE : Number.MAX_SAFE_INTEGER;
    this.#budget = new Budget({
      limitBytes: options.memoryBudgetBytes ?? Math.floor(most),
      use: () => this.#memory(),
      idleBytes: () => this.#models.idleBytes,
      evict: () => this.#evict(),
    });
    const shared = {
      device,
      arena: new Arena(device, 'arena'),
      scratch: new Arena(device, 'lora scratch'),
      work: new PatchWork(device),
      readback: new Readback(device),
      budget: this.#budget,
      stopwatch: Stopwatch.of(device),
      turnover: this.#turnover,
      choices,
    };
    this.#shared = shared;
    const share = Math.min(MAX_POOL_BYTES, this.#budget.limitBytes * POOL_SHARE);
    this.#poolBytes = Math.floor(options.adapterBudgetBytes ?? share);
    this.#loader = new Loader(shared, this.#models, {
      forceDtype: options.forceDtype,
      poolBytes: this.#poolBytes,
      unload: (model) => this.unloadModel(model),
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
    return this.#loader.load(source, dtype, progress);
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
    const { arena, scratch, work, stopwatch, readback } = this.#shared;
    for (const each of [arena, scratch, work, stopwatch, readback]) each?.close();
    this.#device.close();
  }

  /** Reads back every weight buffer of a model, for proving that nothing writes to them. */
  async readWeights(model: string): Promise<readonly Uint8Array[]> {
    const all: Uint8Array[] = [];
    for (const buffer of this.#models.get(model).model.weights.buffers())
      all.push(await this.#device.read(buffer, 0, buffer.size));
    return all;
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

  #evict(): boolean {
    if (this.#models.evictPatched()) return true;
    const isGone = this.#models.evictModel();
    if (isGone) this.#turnover.modelEvictions += 1;
    return isGone;
  }

  #memory(): MemoryUse {
    const { weightBytes, adapterBytes } = this.#models;
    const { arena, scratch, work } = this.#shared;
    return { weightBytes, adapterBytes, arenaBytes: arena.sizeBytes + scratch.sizeBytes + work.sizeBytes };
  }
}
