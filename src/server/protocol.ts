/**
 * The words of wire protocol version 1: constants, operations and the shapes of requests and results. Types only, shared by
 * server and client; what the bytes look like is in `wire.ts`, what the fields mean is in `docs/PROTOCOL.md`.
 */
import type {
  AdapterInfo,
  DeviceInfo,
  EngineStats,
  LoraUse,
  ModelInfo,
  StorageDtype,
} from '../engine/types.ts';
import type { ErrorCode } from '../errors.ts';
import type { UNetConfig } from '../unet/config.ts';

export const PROTOCOL_VERSION = 1;
export const SUBPROTOCOL = 'unetd.v1';
export const SOCKET_PATH = '/v1';

/** Every operation and the kind of frame that carries it. */
export const OPERATIONS = {
  'models.list': 'text',
  'model.load': 'text',
  'model.unload': 'text',
  'model.header': 'text',
  'model.has': 'text',
  'lora.has': 'text',
  'model.put': 'binary',
  'lora.put': 'binary',
  'loras.list': 'text',
  'lora.load': 'text',
  forward: 'binary',
  cancel: 'text',
  stats: 'text',
} as const;

export type Operation = keyof typeof OPERATIONS;

export const CONTROL_LISTS = ['input', 'middle', 'output'] as const;
export type ControlList = (typeof CONTROL_LISTS)[number];

/** `req` of a forward, next to its tensors. */
export interface ForwardHeader {
  readonly model: string;
  readonly loras?: readonly LoraUse[];
  /** Tensor name -> key under which this connection keeps the tensor afterwards. */
  readonly keep?: Readonly<Record<string, string>>;
  /** Tensor name -> key kept earlier, instead of the tensor itself. */
  readonly reuse?: Readonly<Record<string, string>>;
  /** Lengths of ComfyUI's control lists, trailing and leading None counted. */
  readonly control?: Readonly<Partial<Record<ControlList, number>>>;
}

export interface Hello {
  readonly event: 'hello';
  readonly protocol: number;
  readonly server: string;
  readonly device: DeviceInfo;
  readonly limits: { readonly maxMessageBytes: number; readonly maxInFlight: number };
}

export interface ModelEntry {
  readonly name: string;
  readonly sizeBytes: number;
  /** Opaque; changes when the file does. */
  readonly version: string;
  readonly loaded: boolean;
  readonly config?: UNetConfig;
}

export interface LoraEntry {
  readonly name: string;
  readonly sizeBytes: number;
}

export type ModelLoadResult = ModelInfo;
export type LoraLoadResult = AdapterInfo;
export type DtypeChoice = 'auto' | StorageDtype;

/** What a safetensors header says about one tensor. */
export interface TensorEntry {
  readonly dtype: string;
  readonly shape: readonly number[];
}

export interface ModelHeader {
  readonly tensors: Readonly<Record<string, TensorEntry>>;
  readonly metadata: Readonly<Record<string, string>>;
}

export interface Timing {
  /** From the arrival of the request until its batch started. */
  readonly queueMs: number;
  /** Time the batch took in the engine, first submit to readable results. */
  readonly gpuMs: number;
  /** Images in the batch, those of other requests included. */
  readonly batch: number;
  /** Requests in the batch. */
  readonly batchedRequests: number;
}

export interface WireError {
  readonly code: ErrorCode;
  readonly message: string;
  readonly details: Readonly<Record<string, unknown>>;
}

/** One open connection. */
export interface ConnectionStats {
  /** As the log calls it. */
  readonly owner: string;
  /** Address of the peer; that of a proxy where there is one. */
  readonly from: string;
  readonly ageMs: number;
  readonly openRequests: number;
  /** Forwards that gave a result, and their images. */
  readonly forwards: number;
  readonly images: number;
  readonly receivedBytes: number;
  readonly sentBytes: number;
}

/** Work done with one model since the server started; `other` stands for those beyond a fixed number of names. */
export interface ModelWork {
  readonly model: string;
  readonly forwards: number;
  readonly images: number;
  /** Forwards of the engine, each for a whole batch. */
  readonly steps: number;
  readonly gpuMs: number;
}

export interface ServerStats {
  readonly server: string;
  readonly uptimeMs: number;
  readonly ready: boolean;
  readonly engine: EngineStats;
  readonly restarts: number;
  readonly connections: number;
  readonly peers: readonly ConnectionStats[];
  readonly traffic: {
    /** Bytes on the sockets of all WebSockets so far. */
    readonly receivedBytes: number;
    readonly sentBytes: number;
    readonly accepted: number;
    /** Upgrades refused. */
    readonly refused: number;
  };
  readonly queue: { readonly requests: number; readonly limit: number; readonly running: number };
  /** LoRAs that requests without a place in a batch wait for. */
  readonly waitingLoras: readonly string[];
  readonly work: readonly ModelWork[];
  /** Error code -> requests answered with it. */
  readonly errors: Readonly<Partial<Record<ErrorCode, number>>>;
  /** Memory of the process that serves the sockets; the engine has its own. */
  readonly residentBytes: number;
  readonly forwards: {
    readonly completed: number;
    readonly failed: number;
    readonly cancelled: number;
    readonly images: number;
    /** Forwards of the engine, each for a whole batch. */
    readonly batches: number;
    /** Mean requests and images of the batches since the start. */
    readonly meanBatchRequests: number;
    readonly meanBatchImages: number;
  };
  /** Of the last forwards answered, in milliseconds. */
  readonly latencyMs: { readonly p50: number; readonly p95: number; readonly p99: number };
  /** Memory set aside for requests from when they are announced until they are answered; those of up to 64 KiB are not counted. */
  readonly incoming: { readonly bytes: number; readonly limitBytes: number };
  readonly kept: { readonly tensors: number; readonly bytes: number };
  readonly uploads: { readonly files: number; readonly bytes: number; readonly quotaBytes: number };
}
