/**
 * Buffers through which results come back, used again: one is read while the GPU copies into the next. Owns them; there are as
 * many as results were ever on their way at once.
 */
import { type Device, Usage } from './device.ts';

export class Readback {
  readonly #device: Device;
  readonly #free: GPUBuffer[] = [];
  /** When the last result was read. */
  #readAt = 0;

  constructor(device: Device) {
    this.#device = device;
  }

  /** A buffer (MAP_READ, COPY_DST) of at least `sizeBytes`, for one copy and one `read`. */
  take(sizeBytes: number): GPUBuffer {
    const free = this.#free.pop();
    if (free && free.size >= sizeBytes) return free;
    free?.destroy();
    return this.#device.createBuffer('result', sizeBytes, Usage.MAP_READ | Usage.COPY_DST);
  }

  /**
   * Waits for the work that writes the buffer, and takes the buffer back. `waitedMs` counts from the call, or from when the result
   * before it was read where that came later. Errors as `Device.settle`.
   */
  async read(
    buffer: GPUBuffer,
    sizeBytes: number,
  ): Promise<{ readonly bytes: Uint8Array; readonly waitedMs: number }> {
    const calledAt = performance.now();
    try {
      const bytes = await this.#device.readMapped(buffer, sizeBytes);
      const since = Math.max(calledAt, this.#readAt);
      this.#readAt = performance.now();
      return { bytes, waitedMs: this.#readAt - since };
    } finally {
      this.#free.push(buffer);
    }
  }

  close(): void {
    for (const buffer of this.#free.splice(0)) buffer.destroy();
  }
}
