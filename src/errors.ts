/**
 * Every error a caller can meet: one table of codes, one class. `docs/ERRORS.md` lists exactly these codes.
 * Messages say what, where, both values and the cure; this file holds no logic but the class.
 */

/** Code -> when it is raised. Public: clients match on the code, people read the message. */
export const ERRORS = {
  ERR_BAD_FRAME:
    'The WebSocket frame is neither a JSON control message nor a valid safetensors file with a request.',
  ERR_BAD_REQUEST: 'A field of the request is missing, unknown or of the wrong type.',
  ERR_UNKNOWN_OP: 'The request names an operation this server does not have.',
  ERR_DUPLICATE_ID: 'Another open request of this connection has the same id.',
  ERR_TOO_LARGE: 'A frame, a tensor or a batch is larger than a limit of the server or of its adapter.',
  ERR_BUSY:
    'The queue of the server, or the window of this connection, is full; retry after the hinted time.',
  ERR_CANCELLED: 'The request was cancelled by its client.',
  ERR_SHUTTING_DOWN: 'The server is draining and takes no new requests.',
  ERR_UNAUTHORIZED: 'The bearer token is missing or wrong.',
  ERR_SAFETENSORS: 'A safetensors file is truncated, or its header contradicts itself or the data.',
  ERR_UNKNOWN_MODEL: 'No model of that name or digest is known.',
  ERR_MODEL_NOT_LOADED: 'The model is known but not loaded, and the request needs it loaded.',
  ERR_MODEL_INVALID: 'The file is no UNet this program knows: tensors are missing or have the wrong shape.',
  ERR_MODEL_BUSY: 'The model is in use by running requests, or by another connection in another storage.',
  ERR_UNKNOWN_LORA: 'No LoRA of that name or digest is known.',
  ERR_LORA_INVALID: 'The LoRA file is malformed: a matrix is missing, or its shapes do not fit each other.',
  ERR_LORA_UNSUPPORTED: 'The LoRA file holds an adapter kind this server does not apply.',
  ERR_LORA_MISMATCH:
    'The LoRA was made for another architecture: its shapes do not fit the model, or no key matches.',
  ERR_BAD_STRENGTH: 'A LoRA strength is not a finite number.',
  ERR_MISSING_TENSOR: 'The request lacks a tensor the model needs.',
  ERR_UNEXPECTED_TENSOR: 'The request holds a tensor the model has no use for.',
  ERR_BAD_SHAPE: 'A tensor of the request has the wrong shape.',
  ERR_BAD_DTYPE: 'A tensor of the request, or the asked storage, has a dtype that is not supported there.',
  ERR_NOT_KEPT:
    'The key to reuse is not kept on this connection (never kept, or evicted); send the tensor again.',
  ERR_DIGEST_MISMATCH: 'The uploaded tensors do not have the digest they were announced with.',
  ERR_OUT_OF_MEMORY: 'The memory budget, or the adapter, has no room for this.',
  ERR_NO_ADAPTER: 'No usable GPU adapter was found.',
  ERR_GPU: 'The GPU driver reported an error while compiling, recording or running.',
  ERR_DEVICE_LOST: 'The GPU device was lost; the engine restarts.',
  ERR_DISCONNECTED: 'The connection failed or ended before the request was answered (raised by clients).',
  ERR_ENGINE_DOWN: 'The engine process ended and could not run the request again.',
  ERR_INTERNAL: 'A defect of this program; please report it with the message.',
} as const;

export type ErrorCode = keyof typeof ERRORS;

export function isErrorCode(code: string): code is ErrorCode {
  return Object.hasOwn(ERRORS, code);
}

/** An error with a public code. `details` holds the same facts as the message, for programs. */
export class UnetdError extends Error {
  readonly code: ErrorCode;
  readonly details: Readonly<Record<string, unknown>>;

  constructor(code: ErrorCode, message: string, details: Readonly<Record<string, unknown>> = {}) {
    super(message);
    this.name = 'UnetdError';
    this.code = code;
    this.details = details;
  }

  /** Any thrown value as an UnetdError; what has no code becomes ERR_INTERNAL. */
  static from(error: unknown): UnetdError {
    if (error instanceof UnetdError) return error;
    const message = error instanceof Error ? error.message : String(error);
    return new UnetdError('ERR_INTERNAL', message);
  }
}
