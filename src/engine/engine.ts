/**
 * The engine in this process: owns the device and the loaded models, runs one forward at a time. No sockets, no queue; the
 * server runs it in a process of its own (`process.ts`), a library user may create one directly.
 */
import { totalmem } from 'node:os';
import { UnetdError } from '../errors.ts';
import { Arena } from '../gpu/arena.ts';
import { Device } from '../gpu/device.ts';
import type { Timing } from '../gpu/plan.ts';
import { SafetensorsFile } from '../safetensors.ts';
import { inspectUNet } from '../unet/detect.ts';
import { Weights, weightBytes } from '../unet/weights.ts';
import { feedsOf, imagesOf, outsOf, shapeOf } from './batch.ts';
import { checkStep } from './check.ts';
import { LoadedModel } from './model.ts';
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

interface Held {
  readonly info: ModelInfo;
  readonly model: LoadedModel;
  lastUse: number;
}

export class Engine implements EngineApi {
  readonly device: DeviceInfo;
  readonly #device: Device;
  readonly #arena: Arena;
  readonly #scratch: Arena;
  readonly #options: EngineOptions;
  readonly #budgetBytes: number;
  readonly #models = new Map<string, Held>();
  /** Bytes of weights that are being loaded. */
  #loadingBytes = 0;
  #peakBytes = 0;
  #forwards = 0;
  #images = 0;
  #gpuMs = 0;
  #clock = 0;
  /** The forward in progress; the next one starts behind it. */
  #turn: Promise<unknown> = Promise.resolve();

  private constructor(device: Device, options: EngineOptions) {
    this.#device = device;
    this.#options = options;
    const { name, backend, features } = device.adapter;
    this.device = { name, backend, features };
    this.#arena = new Arena(device, 'arena');
    this.#scratch = new Arena(device, 'lora scratch');
    const most = device.capabilities.software ? totalmem() * SOFTWARE_SHARE : Number.MAX_SAFE_INTEGER;
    this.#budgetBytes = options.memoryBudgetBytes ?? Math.floor(most);
  }

  /** Opens the adapter. ERR_NO_ADAPTER. */
  static async create(options: EngineOptions = {}): Promise<Engine> {
    return new Engine(await Device.open({ adapter: options.adapter }), options);
  }

  async loadModel(
    source: FileSource,
    dtype: 'auto' | StorageDtype,
    progress: Progress = () => {},
  ): Promise<ModelInfo> {
    const storage = this.#storageOf(dtype);
    const held = this.#models.get(source.name);
    if (held && held.info.version === source.version && (dtype === 'auto' || held.info.dtype === storage))
      return held.info;
    if (held) await this.unloadModel(source.name);
    const file = await SafetensorsFile.open(source.path);
    try {
      const shapes = new Map([...file.tensors].map(([name, { shape }]) => [name, shape]));
      const { config, sources } = inspectUNet(shapes);
      const sizeBytes = weightBytes(config, storage);
      await this.#makeRoom(source.name, sizeBytes);
      this.#loadingBytes += sizeBytes;
      try {
        const entryOf = (name: string) => file.tensors.get(sources.get(name)!)!;
        const weights = await Weights.load(this.#device, storage, config, file, entryOf, (done, total) =>
          progress('weights', done, total),
        );
        const shared = { device: this.#device, arena: this.#arena, scratch: this.#scratch };
        const poolBytes = Math.min(MAX_POOL_BYTES, Math.floor(this.#budgetBytes * POOL_SHARE));
        const model = new LoadedModel(shared, config, storage, weights, poolBytes);
        const { name, version } = source;
        const info = { model: name, version, dtype: storage, config, sizeBytes: weights.sizeBytes };
        this.#models.set(name, { info, model, lastUse: ++this.#clock });
        this.#notePeak();
        return info;
      } finally {
        this.#loadingBytes -= sizeBytes;
      }
    } finally {
      await file.close();
    }
  }

  async unloadModel(model: string): Promise<void> {
    const { model: loaded } = this.#held(model);
    this.#models.delete(model);
    // A forward that runs keeps its buffers until it is done.
    await this.#turn.catch(() => {});
    loaded.close();
  }

  async loadAdapter(source: FileSource, model: string): Promise<AdapterInfo> {
    const facts = await this.#held(model).model.adapters.load(source);
    this.#notePeak();
    return {
      digest: facts.digest,
      format: facts.format,
      rank: facts.rank,
      layers: facts.layerCount,
      matched: facts.matched.length,
      unmatched: facts.unmatched,
      sizeBytes: facts.sizeBytes,
    };
  }

  forward(batch: Batch): Promise<BatchResult> {
    const result = this.#turn.then(
      () => this.#forward(batch),
      () => this.#forward(batch),
    );
    this.#turn = result.catch(() => {});
    return result;
  }

  /** Timestamps of each dispatch of one forward of the batch. */
  profile(batch: Batch): Promise<readonly Timing[]> {
    const { model, requests, config, loras } = this.#prepare(batch);
    return model.profile(shapeOf(requests), feedsOf(config, model.storage, requests), loras);
  }

  async stats(): Promise<EngineStats> {
    const models = [...this.#models.values()].map(({ info: { config: _, ...info }, model }) => ({
      ...info,
      adapters: model.adapters.resident(),
    }));
    const { weightBytes: weights, adapterBytes, arenaBytes } = this.#memory();
    this.#notePeak();
    return {
      device: this.device,
      memory: {
        budgetBytes: this.#budgetBytes,
        weightBytes: weights,
        adapterBytes,
        arenaBytes,
        peakBytes: this.#peakBytes,
      },
      models,
      forwards: this.#forwards,
      images: this.#images,
      gpuMs: this.#gpuMs,
    };
  }

  async close(): Promise<void> {
    await this.#turn.catch(() => {});
    for (const { model } of this.#models.values()) model.close();
    this.#models.clear();
    this.#arena.close();
    this.#scratch.close();
    this.#device.close();
  }

  /** Reads back every weight buffer of a model, for proving that nothing writes to them. */
  async readWeights(model: string): Promise<readonly Uint8Array[]> {
    const all: Uint8Array[] = [];
    for (const buffer of this.#held(model).model.weights.buffers())
      all.push(await this.#device.read(buffer, 0, buffer.size));
    return all;
  }

  async #forward(batch: Batch): Promise<BatchResult> {
    const { model, requests, config, loras } = this.#prepare(batch);
    const shape = shapeOf(requests);
    const most = this.#options.maxBatch ?? Number.POSITIVE_INFINITY;
    if (shape.images > most)
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `The batch holds ${shape.images} images, this engine takes at most ${most}; send fewer per request`,
        { images: shape.images, limit: most },
      );
    const { out, gpuMs } = await model.forward(shape, feedsOf(config, model.storage, requests), loras);
    this.#forwards += 1;
    this.#images += shape.images;
    this.#gpuMs += gpuMs;
    this.#notePeak();
    return { outs: outsOf(config, requests, out), gpuMs };
  }

  #prepare({ model: name, requests: given }: Batch) {
    const held = this.#held(name);
    held.lastUse = ++this.#clock;
    const { config } = held.info;
    const requests = given.map((request) => checkStep(config, request, name));
    const loras = requests.flatMap((request) =>
      Array.from({ length: imagesOf(request) }, () => request.loras),
    );
    return { model: held.model, requests, config, loras };
  }

  #held(model: string): Held {
    const held = this.#models.get(model);
    if (!held)
      throw new UnetdError('ERR_MODEL_NOT_LOADED', `Model "${model}" is not loaded; load it first`, {
        model,
      });
    return held;
  }

  #storageOf(dtype: 'auto' | StorageDtype): StorageDtype {
    const wanted = this.#options.forceDtype ?? dtype;
    if (wanted === 'auto') return 'f16';
    if (wanted !== 'f16' && wanted !== 'f32')
      throw new UnetdError(
        'ERR_BAD_DTYPE',
        `Storage "${wanted}" is not supported; ask for f32, f16 or auto`,
        {
          dtype: wanted,
        },
      );
    return wanted;
  }

  /** Unloads idle models, least recently used first, until the budget has room. ERR_OUT_OF_MEMORY. */
  async #makeRoom(name: string, needed: number): Promise<void> {
    const used = (): number => {
      const memory = this.#memory();
      return memory.weightBytes + memory.adapterBytes + memory.arenaBytes + this.#loadingBytes;
    };
    while (used() + needed > this.#budgetBytes) {
      const idle = [...this.#models].sort(([, a], [, b]) => a.lastUse - b.lastUse)[0];
      if (!idle)
        throw new UnetdError(
          'ERR_OUT_OF_MEMORY',
          `Model "${name}" needs ${needed} bytes on the GPU, ${used()} of the budget of ${this.#budgetBytes} are in use; raise --memory-budget or load it as f16`,
          { needed, used: used(), budget: this.#budgetBytes },
        );
      await this.unloadModel(idle[0]);
    }
  }

  #memory(): { weightBytes: number; adapterBytes: number; arenaBytes: number } {
    const models = [...this.#models.values()];
    return {
      weightBytes: models.reduce((sum, { info }) => sum + info.sizeBytes, 0),
      adapterBytes: models.reduce((sum, { model }) => sum + model.adapterBytes, 0),
      arenaBytes: this.#arena.sizeBytes + this.#scratch.sizeBytes,
    };
  }

  #notePeak(): void {
    const memory = this.#memory();
    const now = memory.weightBytes + memory.adapterBytes + memory.arenaBytes + this.#loadingBytes;
    this.#peakBytes = Math.max(this.#peakBytes, now);
  }
}
