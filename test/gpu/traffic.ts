/**
 * Counts what this process hands to the GPU, at the bindings themselves: bytes written by label of the buffer, shader
 * modules made, and dispatches recorded. Whatever the code under test believes it uploads, this is what it did.
 */
import { globals } from 'webgpu';

export interface Traffic {
  /** Label of the buffer -> bytes. */
  readonly written: ReadonlyMap<string, number>;
  /** Shader modules. */
  readonly compiled: number;
  readonly dispatched: number;
}

interface Bindings {
  readonly GPUQueue: { readonly prototype: GPUQueue };
  readonly GPUDevice: { readonly prototype: GPUDevice };
  readonly GPUComputePassEncoder: { readonly prototype: GPUComputePassEncoder };
}

const { GPUQueue: Queue, GPUDevice: Device, GPUComputePassEncoder: Pass } = globals as unknown as Bindings;

/** What `work` causes until it settles, and what it gives. One at a time. */
export async function trafficOf<T>(work: () => Promise<T>): Promise<readonly [Traffic, T]> {
  const written = new Map<string, number>();
  let compiled = 0;
  let dispatched = 0;
  const { writeBuffer } = Queue.prototype;
  const { createShaderModule } = Device.prototype;
  const { dispatchWorkgroups } = Pass.prototype;
  Queue.prototype.writeBuffer = function (this: GPUQueue, ...args: Parameters<GPUQueue['writeBuffer']>) {
    const [buffer, , data, offset = 0, size = data.byteLength - offset] = args;
    written.set(buffer.label, (written.get(buffer.label) ?? 0) + size);
    return writeBuffer.apply(this, args);
  } as GPUQueue['writeBuffer'];
  Device.prototype.createShaderModule = function (this: GPUDevice, descriptor) {
    compiled += 1;
    return createShaderModule.call(this, descriptor);
  };
  Pass.prototype.dispatchWorkgroups = function (this: GPUComputePassEncoder, ...counts) {
    dispatched += 1;
    return dispatchWorkgroups.apply(this, counts);
  };
  try {
    const result = await work();
    return [{ written, compiled, dispatched }, result];
  } finally {
    Queue.prototype.writeBuffer = writeBuffer;
    Device.prototype.createShaderModule = createShaderModule;
    Pass.prototype.dispatchWorkgroups = dispatchWorkgroups;
  }
}
