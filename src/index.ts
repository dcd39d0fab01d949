/**
 * The public API: the engine as a library, in this process (`Engine`) or in one of its own (`EngineProcess`), the WebSocket
 * server (`serve`) and client (`Client`), and the safetensors reader. Everything else may change between versions.
 */
export { Client } from './client.ts';
export { Engine } from './engine/engine.ts';
export { EngineProcess } from './engine/process.ts';
export type {
  AdapterInfo,
  Batch,
  BatchResult,
  DeviceInfo,
  EngineApi,
  EngineOptions,
  EngineStats,
  FileSource,
  LoraUse,
  ModelInfo,
  Progress,
  StepRequest,
  StorageDtype,
  TensorData,
} from './engine/types.ts';
export { ERRORS, type ErrorCode, UnetdError } from './errors.ts';
export { type AdapterFacts, listAdapters } from './gpu/device.ts';
export {
  decode,
  digest,
  encode,
  SafetensorsFile,
  type SafetensorsView,
  type TensorView,
} from './safetensors.ts';
export { type RunningServer, type ServeOptions, serve } from './server/serve.ts';
export type { Layer, UNetConfig, UNetModule } from './unet/config.ts';
