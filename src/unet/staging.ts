/**
 * Bytes of a file on their way to the GPU: read straight into mapped buffers, copied and worked on from there. While the GPU
 * works on one of them the next is filled, so a load takes as long as the slower of both. Owns its buffers; knows no weights.
 */
import { Arena } from '../gpu/arena.ts';
import { type Device, MapMode, Usage } from '../gpu/device.ts';
import { alignTo, type Dispatch, type Resident, type Storage } from '../gpu/kernel.ts';
import { Plan } from '../gpu/plan.ts';

/** One is filled, one waits, one is worked on. */
const SLOTS = 3;

export class Staging {
  readonly #device: Device;
  readonly #storage: Storage;
  readonly #sizeBytes: number;
  /** Of the plans that run here, which need none. */
  readonly #arena: Arena;
  readonly #slots: readonly GPUBuffer[];
  /** What kernels read: mapped buffers cannot be bound. */
  readonly #target: GPUBuffer;
  #slot = 0;
  #open: Uint8Array | undefined;
  #used = 0;
  #dispatches: Dispatch[] = [];

  private constructor(device: Device, storage: Storage, slots: readonly GPUBuffer[], target: GPUBuffer) {
    this.#device = device;
    this.#storage = storage;
    this.#sizeBytes = target.size;
    this.#arena = new Arena(device, 'staging arena');
    this.#slots = slots;
    this.#target = target;
  }

  /** `sizeBytes` bounds what one call of `add` takes. ERR_OUT_OF_MEMORY. */
  static async create(device: Device, storage: Storage, sizeBytes: number): Promise<Staging> {
    const [target, ...slots] = await device.guarded('staging', () => [
      device.createBuffer('staging', sizeBytes, Usage.STORAGE | Usage.COPY_DST),
      ...Array.from({ length: SLOTS }, () =>
        device.createBuffer('staging slot', sizeBytes, Usage.MAP_WRITE | Usage.COPY_SRC),
      ),
    ]);
    return new Staging(device, storage, slots, target!);
  }

  /** Has `read` fill `byteLength` bytes, which the dispatch then finds where it is told, padded to 16. ERR_GPU, and what `read` throws. */
  async add(
    byteLength: number,
    read: (target: Uint8Array) => Promise<void>,
    dispatchOf: (src: Resident) => Dispatch,
  ): Promise<void> {
    if (this.#used + byteLength > this.#sizeBytes) await this.flush();
    this.#open ??= await this.#map();
    const offset = this.#used;
    this.#used = alignTo(offset + byteLength, this.#device.capabilities.offsetAlignment);
    await read(this.#open.subarray(offset, offset + byteLength));
    this.#dispatches.push(
      dispatchOf({
        kind: 'resident',
        label: 'staging',
        current: () => this.#target,
        offset,
        sizeBytes: alignTo(byteLength, 16),
      }),
    );
  }

  /** Sends off what was added. ERR_GPU. */
  async flush(): Promise<void> {
    if (!this.#open) return;
    const slot = this.#slots[this.#slot]!;
    slot.unmap();
    this.#open = undefined;
    this.#slot = (this.#slot + 1) % SLOTS;
    const plan = await Plan.compile(this.#device, this.#arena, {
      label: 'staging',
      storage: this.#storage,
      steps: this.#dispatches.map((dispatch) => ({ kind: 'always', dispatch })),
      feeds: [],
      results: [],
    });
    const encoder = this.#device.gpu.createCommandEncoder();
    encoder.copyBufferToBuffer(slot, 0, this.#target, 0, Math.min(this.#used, this.#sizeBytes));
    plan.encode(encoder);
    this.#device.gpu.queue.submit([encoder.finish()]);
    plan.close();
    this.#used = 0;
    this.#dispatches = [];
  }

  /** Waits for the GPU. ERR_GPU, ERR_DEVICE_LOST. */
  async done(): Promise<void> {
    await this.flush();
    await this.#device.settle(() => this.#device.gpu.queue.onSubmittedWorkDone());
  }

  close(): void {
    for (const buffer of [...this.#slots, this.#target]) buffer.destroy();
    this.#arena.close();
  }

  /** The next slot's memory, once the GPU has copied what was in it. */
  async #map(): Promise<Uint8Array> {
    const slot = this.#slots[this.#slot]!;
    await this.#device.settle(() => slot.mapAsync(MapMode.WRITE));
    return new Uint8Array(slot.getMappedRange());
  }
}
