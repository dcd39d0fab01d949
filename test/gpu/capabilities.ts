/** What WebGPU guarantees of any adapter: for plans and choices that no adapter is asked for. */
import type { Capabilities } from '../../src/gpu/kernel.ts';

export const GUARANTEED: Capabilities = {
  subgroupSize: 0,
  matrices: [],
  software: false,
  maxBindingBytes: 2 ** 27,
  maxBufferBytes: 2 ** 28,
  offsetAlignment: 256,
};
