/**
 * Stands in for the whole engine in tests of sockets, batching and processes: simple arithmetic, no UNet and no GPU.
 * out = x * (1 + timestep / 1000 + sum(strength * factor)) + mean(context), per image; `factor` is the first number of the
 * LoRA file. Behaviour (delay, memory, config) is stated in the metadata of the model file.
 */
import { setTimeout as sleep } from 'node:timers/promises';
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
  StepRequest,
  StorageDtype,
  TensorData,
} from '../../src/engine/types.ts';
import { UnetdError } from '../../src/errors.ts';
import { fromF32, toF32 } from '../../src/half.ts';
import { SafetensorsFile } from '../../src/safetensors.ts';
import type { UNetConfig } from '../../src/unet/config.ts';

/** A context that begins with one of these makes the forward fail in that way. */
export const TROUBLE = { gpuError: 6660, crash: 6661, deviceLost: 6662 } as const;

interface Model {
  readonly info: ModelInfo;
  readonly delayMs: number;
  readonly maxImages: number;
  readonly factors: Map<string, number>;
}

export class StandInEngine implements EngineApi {
  readonly device: DeviceInfo = { name: 'stand-in', backend: 'none', features: [] };
  readonly batches: { model: string; requests: number; images: number }[] = [];
  readonly loads: string[] = [];
  readonly #models = new Map<string, Model>();
  #last: Promise<unknown> = Promise.resolve();
  readonly #turnover = { modelLoads: 0, modelEvictions: 0, adapterLoads: 0, adapterEvictions: 0 };
  #images = 0;
  #gpuMs = 0;
  #gate: Promise<void> = Promise.resolve();

  static create(_options: EngineOptions = {}): Promise<StandInEngine> {
    return Promise.resolve(new StandInEngine());
  }

  async loadModel(source: FileSource, dtype: 'auto' | StorageDtype, progress?: Progress): Promise<ModelInfo> {
    const held = this.#models.get(source.name);
    const stored = dtype === 'auto' ? (held?.info.dtype ?? 'f16') : dtype;
    if (held?.info.version === source.version && held.info.dtype === stored) return held.info;
    const file = await SafetensorsFile.open(source.path);
    await file.close();
    const text = file.metadata.get('config');
    if (text === undefined) throw new UnetdError('ERR_MODEL_INVALID', `"${source.name}" is no UNet.`);
    if (file.metadata.has('crash')) process.kill(process.pid, 'SIGKILL');
    const parts = Number(file.metadata.get('loadParts') ?? 3);
    for (let part = 0; part <= parts; part += 1) {
      progress?.('weights', part, parts);
      if (file.metadata.has('loadMs')) await sleep(Number(file.metadata.get('loadMs')) / parts);
    }
    const config = JSON.parse(text) as UNetConfig;
    const info = { model: source.name, version: source.version, dtype: stored, config, sizeBytes: 1000 };
    const delayMs = Number(file.metadata.get('delayMs') ?? 0);
    const maxImages = Number(file.metadata.get('maxImages') ?? Number.POSITIVE_INFINITY);
    this.#models.set(source.name, { info, delayMs, maxImages, factors: new Map() });
    this.loads.push(source.name);
    this.#turnover.modelLoads += 1;
    return info;
  }

  async unloadModel(model: string): Promise<void> {
    if (!this.#models.delete(model)) throw notLoaded(model);
  }

  async loadAdapter(source: FileSource, model: string): Promise<AdapterInfo> {
    const { factors } = this.#models.get(model) ?? missing(model);
    const file = await SafetensorsFile.open(source.path);
    try {
      const [name] = file.tensors.keys();
      if (name === undefined) throw new UnetdError('ERR_LORA_INVALID', `"${source.name}" is empty.`);
      factors.set(source.name, toF32('F32', await file.read(name))[0]!);
      this.loads.push(source.name);
      this.#turnover.adapterLoads += 1;
      return {
        digest: await file.digest(),
        format: 'stand-in',
        rank: 1,
        layers: 1,
        matched: 1,
        unmatched: [],
        sizeBytes: 4,
      };
    } finally {
      await file.close();
    }
  }

  async readyAdapters(): Promise<void> {}

  forward(batch: Batch): Promise<BatchResult> {
    const mine = this.#last.catch(() => {}).then(() => this.#run(batch));
    this.#last = mine;
    return mine;
  }

  /** Lets no forward finish until the result is called. */
  hold(): () => void {
    let release = (): void => {};
    this.#gate = new Promise((resolve) => {
      release = resolve;
    });
    return release;
  }

  /** Drops what is loaded without telling anyone, as an engine short of memory may. */
  evictAll(): void {
    this.#turnover.modelEvictions += this.#models.size;
    this.#models.clear();
  }

  async stats(): Promise<EngineStats> {
    const models = [...this.#models.values()].map(({ info: { config: _, ...info }, factors }) => ({
      ...info,
      adapters: [...factors.keys()].map((lora) => ({ lora, sizeBytes: 4 })),
    }));
    const memory = {
      budgetBytes: 1e9,
      adapterBudgetBytes: 40,
      weightBytes: 1e6,
      adapterBytes: 10,
      arenaBytes: 100,
      peakBytes: 2e6,
    };
    return {
      device: this.device,
      memory,
      models,
      turnover: { ...this.#turnover },
      forwards: this.batches.length,
      images: this.#images,
      gpuMs: this.#gpuMs,
    };
  }

  async close(): Promise<void> {
    this.#models.clear();
  }

  async #run({ model, requests }: Batch): Promise<BatchResult> {
    const { delayMs, maxImages, factors } = this.#models.get(model) ?? missing(model);
    const images = requests.reduce((sum, { x }) => sum + x.shape[0]!, 0);
    await this.#gate;
    await sleep(delayMs);
    if (images > maxImages)
      throw new UnetdError('ERR_OUT_OF_MEMORY', `${images} images, room for ${maxImages}.`);
    const outs = requests.map((request) => standInResult(request, factors));
    this.batches.push({ model, requests: requests.length, images });
    this.#images += images;
    this.#gpuMs += delayMs;
    return { outs, gpuMs: delayMs };
  }
}

/** The child process looks for this name. */
export { StandInEngine as Engine };

/** What the stand-in computes, also for tests to compare with. */
export function standInResult(request: StepRequest, factors: ReadonlyMap<string, number>): TensorData {
  const context = toF32(request.context.dtype, request.context.data);
  if (context[0] === TROUBLE.gpuError) throw new UnetdError('ERR_GPU', 'This context is trouble.');
  if (context[0] === TROUBLE.crash) process.kill(process.pid, 'SIGKILL');
  if (context[0] === TROUBLE.deviceLost) throw new UnetdError('ERR_DEVICE_LOST', 'The device is gone.');
  const x = toF32(request.x.dtype, request.x.data);
  const times = toF32('F32', request.timesteps.data);
  const perImage = x.length / times.length;
  const contextPerImage = context.length / times.length;
  let scale = 1;
  for (const { lora, strength } of request.loras) {
    const factor = factors.get(lora);
    if (factor === undefined) throw new UnetdError('ERR_UNKNOWN_LORA', `"${lora}" is not loaded.`);
    scale += strength * factor;
  }
  const [, , ...size] = request.x.shape;
  const out = x.map((value, index) => {
    const image = Math.floor(index / perImage);
    const own = context.subarray(image * contextPerImage, (image + 1) * contextPerImage);
    const mean = own.reduce((sum, each) => sum + each, 0) / own.length;
    return value * (scale + times[image]! / 1000) + mean;
  });
  const shape = [request.x.shape[0]!, request.x.shape[1]!, ...size];
  return { dtype: request.x.dtype, shape, data: fromF32(request.x.dtype, out) };
}

function notLoaded(model: string): UnetdError {
  return new UnetdError('ERR_MODEL_NOT_LOADED', `"${model}" is not loaded.`);
}

function missing(model: string): never {
  throw notLoaded(model);
}
