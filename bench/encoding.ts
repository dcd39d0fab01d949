/**
 * Times what encoding a forward costs on the CPU, at the bindings themselves: from the start of a compute pass to its end, and
 * from there until the work is submitted. Knows no engine.
 */
import { globals } from 'webgpu';

export interface Encoding {
  /** All passes together, `beginComputePass` to `end`. */
  readonly encodeMs: number;
  /** `finish` and `submit`, where the driver may record its own commands. */
  readonly submitMs: number;
}

interface Bindings {
  readonly GPUCommandEncoder: { readonly prototype: GPUCommandEncoder };
  readonly GPUComputePassEncoder: { readonly prototype: GPUComputePassEncoder };
  readonly GPUQueue: { readonly prototype: GPUQueue };
}

const bindings = globals as unknown as Bindings;

/** What `work` encodes until it settles, and what it gives. One at a time; passes must not overlap. */
export async function encodingOf<T>(work: () => Promise<T>): Promise<readonly [Encoding, T]> {
  const encoder = bindings.GPUCommandEncoder.prototype;
  const pass = bindings.GPUComputePassEncoder.prototype;
  const queue = bindings.GPUQueue.prototype;
  const { beginComputePass, finish } = encoder;
  const { end } = pass;
  const { submit } = queue;
  let [encodeMs, submitMs, begun] = [0, 0, 0];
  encoder.beginComputePass = function (this: GPUCommandEncoder, descriptor) {
    begun = performance.now();
    return beginComputePass.call(this, descriptor);
  };
  pass.end = function (this: GPUComputePassEncoder) {
    end.call(this);
    encodeMs += performance.now() - begun;
  };
  const timed = <R>(call: () => R): R => {
    const start = performance.now();
    try {
      return call();
    } finally {
      submitMs += performance.now() - start;
    }
  };
  encoder.finish = function (this: GPUCommandEncoder, descriptor) {
    return timed(() => finish.call(this, descriptor));
  };
  queue.submit = function (this: GPUQueue, buffers) {
    return timed(() => submit.call(this, buffers));
  };
  try {
    const result = await work();
    return [{ encodeMs, submitMs }, result];
  } finally {
    Object.assign(encoder, { beginComputePass, finish });
    Object.assign(pass, { end });
    Object.assign(queue, { submit });
  }
}
