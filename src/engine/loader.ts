/**
 * Files to models on the GPU, one after another and within the budget. Holds none of them (`held.ts`) and runs no forwards.
 */
import { UnetdError } from '../errors.ts';
import { storageOf } from '../kernels/panel.ts';
import type { AdapterTurnover } from '../lora/shelf.ts';
import { SafetensorsFile } from '../safetensors.ts';
import { weightBytes } from '../unet/packed.ts';
import { Weights } from '../unet/weights.ts';
import type { HeldModels } from './held.ts';
import { inspectModel } from './inspect.ts';
import { LoadedModel, type Shared } from './model.ts';
import {
  type FileSource,
  type ModelInfo,
  type Progress,
  STORAGE_CHOICES,
  type StorageDtype,
} from './types.ts';

/** What takes less memory than a storage. */
const SMALLER: Readonly<Record<StorageDtype, StorageDtype | undefined>> = {
  f32: 'f16',
  f16: 'q8_0',
  q8_0: undefined,
};

export interface LoaderOptions {
  /** Storage of every model, whatever a load asks for. */
  readonly forceDtype?: StorageDtype | undefined;
  /** Most bytes of the adapters of one model. */
  readonly poolBytes: number;
  /** Lets a held model go, once its forwards are over. */
  readonly unload: (model: string) => Promise<void>;
}

type LoaderShared = Shared & { readonly turnover: AdapterTurnover & { modelLoads: number } };

export class Loader {
  readonly #shared: LoaderShared;
  readonly #models: HeldModels;
  readonly #options: LoaderOptions;
  /** The load in progress. */
  #loading: Promise<unknown> = Promise.resolve();

  constructor(shared: LoaderShared, models: HeldModels, options: LoaderOptions) {
    this.#shared = shared;
    this.#models = models;
    this.#options = options;
  }

  /** Adds a model to those that are held, unless it is among them as it is asked for. */
  load(source: FileSource, dtype: 'auto' | StorageDtype, progress: Progress): Promise<ModelInfo> {
    const loading = this.#loading.then(() => this.#load(source, dtype, progress));
    this.#loading = loading.catch(() => {});
    return loading;
  }

  async #load(source: FileSource, dtype: 'auto' | StorageDtype, progress: Progress): Promise<ModelInfo> {
    const { device, budget, turnover } = this.#shared;
    const { name, version } = source;
    const stored = this.#storedAs(dtype);
    const held = this.#models.find(name);
    if (held && held.info.version === version && (dtype === 'auto' || held.info.dtype === stored))
      return held.info;
    const file = await SafetensorsFile.open(source.path);
    try {
      const { config, entryOf } = inspectModel(name, file);
      // A file that is no model leaves the one of that name as it was.
      if (held) await this.#options.unload(name);
      const sizeBytes = weightBytes(config, stored, device.capabilities);
      const smaller = SMALLER[stored];
      const cure = smaller ? `load it as ${smaller}, or raise --memory-budget` : 'raise --memory-budget';
      budget.demand(`The weights of model "${name}" in ${stored}`, sizeBytes, 0, cure);
      const release = budget.reserve(sizeBytes);
      try {
        const weights = await Weights.load(device, stored, config, file, entryOf, (done, total) =>
          progress('weights', done, total),
        );
        const info = { model: name, version, dtype: stored, config, sizeBytes: weights.sizeBytes };
        const { poolBytes } = this.#options;
        this.#models.add(info, new LoadedModel(this.#shared, config, storageOf(stored), weights, poolBytes));
        turnover.modelLoads += 1;
        return info;
      } finally {
        release();
      }
    } finally {
      await file.close();
    }
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
}
