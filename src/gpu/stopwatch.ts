/**
 * The time a compute pass takes on the GPU itself, by two timestamps: time on the CPU would count the waiting too.
 */
import { type Device, Usage } from './device.ts';

/** Bytes of one measurement, as it lies behind a result. */
export const STOPWATCH_BYTES = 16;

export class Stopwatch {
  /** For `beginComputePass`. */
  readonly writes: GPUComputePassTimestampWrites;
  readonly #querySet: GPUQuerySet;
  readonly #resolved: GPUBuffer;

  private constructor(device: Device) {
    this.#querySet = device.gpu.createQuerySet({ label: 'stopwatch', type: 'timestamp', count: 2 });
    this.#resolved = device.createBuffer('stopwatch', STOPWATCH_BYTES, Usage.QUERY_RESOLVE | Usage.COPY_SRC);
    this.writes = { querySet: this.#querySet, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 };
  }

  /** Undefined where the adapter has no timestamps. */
  static of(device: Device): Stopwatch | undefined {
    return device.gpu.features.has('timestamp-query') ? new Stopwatch(device) : undefined;
  }

  /** Behind the pass: copies the measurement into a buffer, whose bytes `elapsedMs` reads. */
  stop(encoder: GPUCommandEncoder, into: GPUBuffer, offset: number): void {
    encoder.resolveQuerySet(this.#querySet, 0, 2, this.#resolved, 0);
    encoder.copyBufferToBuffer(this.#resolved, 0, into, offset, STOPWATCH_BYTES);
  }

  close(): void {
    this.#querySet.destroy();
    this.#resolved.destroy();
  }
}

/** Milliseconds between the two timestamps (nanoseconds, 64 bits each). */
export function elapsedMs(bytes: Uint8Array): number {
  const view = new DataView(bytes.buffer, bytes.byteOffset, STOPWATCH_BYTES);
  return Number(view.getBigUint64(8, true) - view.getBigUint64(0, true)) / 1e6;
}
