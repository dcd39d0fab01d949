/**
 * The contract of the engine: models, adapters and forwards, without sockets and without saying where it runs
 * (in this process, `Engine`, or in a child, `EngineProcess`). Every value can be structured-cloned.
 */
import type { UNetConfig } from '../unet/config.ts';

/** Dense row-major tensor bytes, little endian. `data` may be a view that is not aligned to its elements. */
export interface TensorData {
  readonly dtype: 'F32' | 'F16';
  readonly shape: readonly number[];
  readonly data: Uint8Array;
}

/**
 * How weights and activations are stored on the GPU; sums are always f32. `q8_0`: the matrices in bytes with a scale for each 32
 * of them, all else as in f16.
 */
export type StorageDtype = 'f32' | 'f16' | 'q8_0';

/** What may be asked for: `auto` is f16. */
export const STORAGE_CHOICES: readonly ('auto' | StorageDtype)[] = ['auto', 'f32', 'f16', 'q8_0'];

/** A file to load. `name` is what clients call it, `version` changes when the file does. */
export interface FileSource {
  readonly name: string;
  readonly path: string;
  readonly version: string;
}

export interface ModelInfo {
  readonly model: string;
  readonly version: string;
  readonly dtype: StorageDtype;
  readonly config: UNetConfig;
  /** GPU bytes of the weights. */
  readonly sizeBytes: number;
}

export interface AdapterInfo {
  readonly digest: string;
  readonly format: string;
  /** Largest rank of a layer. */
  readonly rank: number;
  readonly layers: number;
  readonly matched: number;
  readonly unmatched: readonly string[];
  /** Those of the unmatched keys that belong to a text encoder, which is the caller's. */
  readonly textEncoder?: readonly string[];
  readonly sizeBytes: number;
}

export interface LoraUse {
  /** Name of an adapter loaded with `loadAdapter` for the same model. */
  readonly lora: string;
  readonly strength: number;
}

/** One checked forward request of N images; tensors as in the wire protocol's `forward`. */
export interface StepRequest {
  readonly loras: readonly LoraUse[];
  readonly x: TensorData;
  readonly timesteps: TensorData;
  readonly context: TensorData;
  readonly y?: TensorData;
  /**
   * ControlNet residuals in ComfyUI's order, `null` for None. `checkStep` brings each list that holds any to one entry
   * per block (1 for middle): entry `length - 1 - b` is added after input block b, after the middle block, or to the skip
   * that output block b takes.
   */
  readonly control?: {
    readonly input?: readonly (TensorData | null)[];
    readonly middle?: readonly (TensorData | null)[];
    readonly output?: readonly (TensorData | null)[];
  };
}

/** Requests that run as one forward: same model and same `batchKey`. Their LoRA stacks may differ. */
export interface Batch {
  readonly model: string;
  readonly requests: readonly StepRequest[];
}

export interface BatchResult {
  /** `out` [N, C_out, H, W] of each request, in its `x` dtype, in the order of the requests. */
  readonly outs: readonly TensorData[];
  /** Time the forward took on the GPU; where the adapter has no timestamps, from submit until the result was readable. */
  readonly gpuMs: number;
}

export interface DeviceInfo {
  readonly name: string;
  readonly backend: string;
  readonly features: readonly string[];
  /** How many choices of kernels measuring on this device has changed; left out where it was not measured. */
  readonly tuned?: number;
}

export interface EngineStats {
  readonly device: DeviceInfo;
  readonly memory: {
    readonly budgetBytes: number;
    /** Most that the adapters of one model may take. */
    readonly adapterBudgetBytes: number;
    readonly weightBytes: number;
    readonly adapterBytes: number;
    readonly arenaBytes: number;
    readonly peakBytes: number;
  };
  readonly models: readonly (Omit<ModelInfo, 'config'> & {
    /** Those on the GPU. Of several names for the same tensors, the first has their bytes. */
    readonly adapters: readonly { readonly lora: string; readonly sizeBytes: number }[];
  })[];
  /** What was put on the GPU, and what had to make room, since the engine started. */
  readonly turnover: {
    readonly modelLoads: number;
    readonly modelEvictions: number;
    readonly adapterLoads: number;
    readonly adapterEvictions: number;
  };
  readonly forwards: number;
  readonly images: number;
  readonly gpuMs: number;
}

export type Progress = (stage: string, done: number, total: number) => void;

/** How to make an engine. */
export interface EngineOptions {
  /** Part of the name of the adapter to use; the first usable one otherwise. */
  readonly adapter?: string;
  /** GPU bytes for weights, adapters and activations. */
  readonly memoryBudgetBytes?: number;
  /** GPU bytes for the adapters of one model; a quarter of the budget, at most 4 GiB, unless told. */
  readonly adapterBudgetBytes?: number;
  /** Lowers the largest binding of the adapter, to try the splitting of large tensors where bindings are large. */
  readonly maxBindingBytes?: number;
  /** Most images of one forward. */
  readonly maxBatch?: number;
  /** Storage of every model, whatever a load asks for. */
  readonly forceDtype?: StorageDtype;
  /** File of choices that `unetd tune` measured; the one in the user's cache unless told, none where false. */
  readonly tuning?: string | false;
}

/** What the owner of an engine in another process can see of it. */
export interface EngineHealth {
  /** Whether it answers now; false while it restarts. */
  readonly alive: boolean;
  readonly restarts: number;
}

export interface EngineApi {
  readonly device: DeviceInfo;
  /** Loads a UNet; a loaded one of the same version and dtype returns at once. ERR_MODEL_INVALID, ERR_SAFETENSORS, ERR_OUT_OF_MEMORY, ERR_TOO_LARGE, ERR_BAD_DTYPE. */
  loadModel(source: FileSource, dtype: 'auto' | StorageDtype, progress?: Progress): Promise<ModelInfo>;
  /** ERR_MODEL_NOT_LOADED. The caller makes sure that no request runs. */
  unloadModel(model: string): Promise<void>;
  /** Parses a LoRA file for a loaded model and puts it on the GPU; one loaded in the same version returns at once. ERR_LORA_*, ERR_SAFETENSORS, ERR_MODEL_NOT_LOADED, ERR_OUT_OF_MEMORY. */
  loadAdapter(source: FileSource, model: string): Promise<AdapterInfo>;
  /**
   * Puts loaded adapters that had to make room back on the GPU, so that the forward of a request that waits need not read
   * them while others wait for it. ERR_UNKNOWN_LORA, and as `loadAdapter`.
   */
  readyAdapters(model: string, loras: readonly string[]): Promise<void>;
  /** Runs one batch. All adapters must be loaded. ERR_MODEL_NOT_LOADED, ERR_UNKNOWN_LORA, ERR_OUT_OF_MEMORY, ERR_TOO_LARGE, ERR_GPU, ERR_DEVICE_LOST, and as `checkStep`. */
  forward(batch: Batch): Promise<BatchResult>;
  stats(): Promise<EngineStats>;
  close(): Promise<void>;
}
