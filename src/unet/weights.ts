/**
 * The frozen weights of one UNet on the GPU: read from the file in chunks, packed by a kernel, never written again.
 * Owns their buffers; knows files by their open handle, not by path or name.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { UnetdError } from '../errors.ts';
import { Arena } from '../gpu/arena.ts';
import { type Device, Usage } from '../gpu/device.ts';
import { alignTo, ceilDiv, type Operand, type Resident, type Storage, storageBytes } from '../gpu/kernel.ts';
import { Plan } from '../gpu/plan.ts';
import { toF32 } from '../half.ts';
import { PANEL } from '../kernels/gemm.ts';
import { packOf } from '../kernels/pack.ts';
import type { SafetensorsFile, TensorEntry } from '../safetensors.ts';
import type { UNetConfig } from './config.ts';
import { storedChannels, type WeightSource } from './draft.ts';
import { layersOf, type Part, partsOf } from './layers.ts';
import type { Matrix } from './matmul.ts';
import { checkDtypes, isMatrix, matrixBytes, vectorBytes, vectorNames } from './packed.ts';

/** File bytes uploaded at a time: all that loading holds in JS memory. */
const CHUNK_BYTES = 16 * 1024 * 1024;
/** File bytes in flight before loading waits for the GPU: the driver keeps a copy of them until they are packed. */
const MAX_QUEUED_BYTES = 4 * CHUNK_BYTES;

/** Progress in file bytes. */
export type OnBytes = (done: number, total: number) => void;

interface PackedMatrix {
  readonly buffer: GPUBuffer;
  readonly matrix: Matrix;
}

const resident = (label: string, buffer: GPUBuffer, offset: number, sizeBytes: number): Resident => ({
  kind: 'resident',
  label,
  current: () => buffer,
  offset,
  sizeBytes,
});

/** The bytes of a tensor of the model from `start` on. */
const tensorOf = (name: string, start: number, operand: Resident): Resident => ({
  ...operand,
  tensor: { name, offset: start },
});

export class Weights implements WeightSource {
  readonly sizeBytes: number;
  readonly #matrices: ReadonlyMap<string, PackedMatrix>;
  readonly #vectors: ReadonlyMap<string, Operand>;
  readonly #vectorBuffer: GPUBuffer;

  private constructor(
    matrices: ReadonlyMap<string, PackedMatrix>,
    vectors: ReadonlyMap<string, Operand>,
    vectorBuffer: GPUBuffer,
  ) {
    this.#matrices = matrices;
    this.#vectors = vectors;
    this.#vectorBuffer = vectorBuffer;
    this.sizeBytes = [...matrices.values()].reduce((sum, m) => sum + m.buffer.size, vectorBuffer.size);
  }

  /**
   * Uploads every tensor of the config. `entryOf` finds a tensor of the file by its LDM name. ERR_OUT_OF_MEMORY,
   * ERR_SAFETENSORS (the file shrank), ERR_MODEL_INVALID (a dtype that cannot be packed).
   */
  static async load(
    device: Device,
    storage: Storage,
    config: UNetConfig,
    file: SafetensorsFile,
    entryOf: (ldmName: string) => TensorEntry,
    onBytes: OnBytes = () => {},
  ): Promise<Weights> {
    const loader = new Loader(device, storage, config, file, entryOf, onBytes);
    try {
      const { matrices, vectors, vectorBuffer } = await loader.load();
      return new Weights(matrices, vectors, vectorBuffer);
    } catch (error) {
      loader.discard();
      throw error;
    } finally {
      loader.close();
    }
  }

  matrix(id: string): Matrix {
    const found = this.#matrices.get(id);
    if (!found) throw new Error(`the model has no layer ${id}`);
    return found.matrix;
  }

  vector(name: string): Operand | undefined {
    return this.#vectors.get(name);
  }

  /** Every weight buffer, to read them back. */
  buffers(): readonly GPUBuffer[] {
    return [...[...this.#matrices.values()].map((m) => m.buffer), this.#vectorBuffer];
  }

  close(): void {
    for (const buffer of this.buffers()) buffer.destroy();
  }
}

/** One load: the chunk, the staging buffer and what has been made so far. */
class Loader {
  readonly #device: Device;
  readonly #storage: Storage;
  readonly #config: UNetConfig;
  readonly #file: SafetensorsFile;
  readonly #entryOf: (ldmName: string) => TensorEntry;
  readonly #onBytes: OnBytes;
  readonly #chunk: Uint8Array;
  readonly #stagingBytes: number;
  readonly #arena: Arena;
  readonly #made: GPUBuffer[] = [];
  #staging: GPUBuffer | undefined;
  #queuedBytes = 0;
  #done = 0;
  #total = 0;

  constructor(
    device: Device,
    storage: Storage,
    config: UNetConfig,
    file: SafetensorsFile,
    entryOf: (ldmName: string) => TensorEntry,
    onBytes: OnBytes,
  ) {
    this.#device = device;
    this.#storage = storage;
    this.#config = config;
    this.#file = file;
    this.#entryOf = entryOf;
    this.#onBytes = onBytes;
    const widestPanel = Math.max(
      ...partsOf(config).map((part) => PANEL * part.inFeatures * part.kernel ** 2 * 4),
    );
    this.#stagingBytes = Math.max(CHUNK_BYTES, alignTo(widestPanel, 16));
    this.#chunk = new Uint8Array(this.#stagingBytes);
    this.#arena = new Arena(device, 'weight packing');
  }

  async load(): Promise<{
    matrices: ReadonlyMap<string, PackedMatrix>;
    vectors: ReadonlyMap<string, Operand>;
    vectorBuffer: GPUBuffer;
  }> {
    checkDtypes(this.#config, this.#entryOf);
    const parts = partsOf(this.#config);
    const slots = new Map(layersOf(this.#config).map((layer, slot) => [layer.id, slot]));
    this.#total = parts.reduce(
      (sum, { id, bias }) =>
        sum + this.#entryOf(`${id}.weight`).byteLength + (bias ? this.#entryOf(`${id}.bias`).byteLength : 0),
      0,
    );
    this.#staging = await this.#create('weight staging', this.#stagingBytes);
    const matrices = new Map<string, PackedMatrix>();
    const { vectors, buffer: vectorBuffer } = await this.#loadVectors(parts);
    for (const part of parts)
      if (isMatrix(part)) matrices.set(part.id, await this.#loadMatrix(part, slots.get(part.id) ?? -1));
    await this.#drain();
    return { matrices, vectors, vectorBuffer };
  }

  discard(): void {
    for (const buffer of this.#made) buffer.destroy();
  }

  close(): void {
    this.#staging?.destroy();
    this.#arena.close();
  }

  async #create(label: string, sizeBytes: number): Promise<GPUBuffer> {
    const usage = Usage.STORAGE | Usage.COPY_DST | Usage.COPY_SRC;
    const buffer = await this.#device.guarded(`loading ${label}`, () =>
      this.#device.createBuffer(label, sizeBytes, usage),
    );
    this.#made.push(buffer);
    return buffer;
  }

  /** Biases and norm parameters in f32, all in one buffer. */
  async #loadVectors(
    parts: readonly Part[],
  ): Promise<{ vectors: ReadonlyMap<string, Operand>; buffer: GPUBuffer }> {
    const alignment = this.#device.capabilities.offsetAlignment;
    const places: { name: string; offset: number; sizeBytes: number }[] = [];
    let total = 0;
    for (const part of parts) {
      const sizeBytes = storedChannels(part.outFeatures) * 4;
      for (const name of vectorNames(part)) {
        places.push({ name, offset: total, sizeBytes });
        total += vectorBytes(part, alignment);
      }
    }
    const all = new Uint8Array(total);
    for (const { name, offset } of places) {
      const entry = this.#entryOf(name);
      const values = toF32(entry.dtype, await this.#file.read(entry.name));
      all.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), offset);
      this.#advance(entry.byteLength);
    }
    const buffer = await this.#create('vectors', total);
    this.#device.gpu.queue.writeBuffer(buffer, 0, all);
    const vectors = new Map(
      places.map(({ name, offset, sizeBytes }) => [
        name,
        tensorOf(name, 0, resident(name, buffer, offset, sizeBytes)),
      ]),
    );
    return { vectors, buffer };
  }

  async #loadMatrix(part: Part, slot: number): Promise<PackedMatrix> {
    const { id, inFeatures, outFeatures, kernel } = part;
    const entry = this.#entryOf(`${id}.weight`);
    const buffer = await this.#create(id, matrixBytes(part, this.#storage));
    const rowBytes = entry.byteLength / outFeatures;
    const panelQuads = (kernel ** 2 * storedChannels(inFeatures) * PANEL) / 4;
    const most = this.#device.capabilities.maxBindingBytes;
    const panelBytes = panelQuads * 4 * storageBytes(this.#storage);
    const widest = Math.max(panelBytes, rowBytes * PANEL);
    if (widest > most)
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `${PANEL} columns of ${entry.name} take ${widest} bytes, the adapter binds at most ${most}: it cannot hold this model`,
        { tensor: entry.name, needed: widest, limit: most },
      );
    // A chunk is bound twice, as the file has it and packed.
    const perChunk = Math.max(
      1,
      Math.min(
        Math.floor(Math.min(most, this.#chunk.byteLength) / (rowBytes * PANEL)),
        Math.floor(most / panelBytes),
      ),
    );
    for (let panel = 0; panel * PANEL < outFeatures; panel += perChunk) {
      const rows = Math.min(perChunk * PANEL, outFeatures - panel * PANEL);
      const outBytes = ceilDiv(rows, PANEL) * panelBytes;
      const out = resident(id, buffer, panel * panelBytes, outBytes);
      await this.#packRows(part, entry, panel * PANEL * rowBytes, rows, rows * rowBytes, out);
    }
    const range = (offset: number, sizeBytes: number): Operand =>
      tensorOf(`${id}.weight`, offset, resident(id, buffer, offset, sizeBytes));
    return { buffer, matrix: { slot, inFeatures, outFeatures, kernel, range } };
  }

  async #packRows(
    { id, inFeatures, kernel }: Part,
    entry: TensorEntry,
    start: number,
    rows: number,
    byteLength: number,
    out: Resident,
  ): Promise<void> {
    await this.#file.readInto(entry, this.#chunk.subarray(0, byteLength), start);
    const { gpu } = this.#device;
    const staging = this.#staging!;
    gpu.queue.writeBuffer(staging, 0, this.#chunk, 0, alignTo(byteLength, 4));
    const dispatch = packOf({
      label: id,
      dtype: entry.dtype,
      rows,
      channels: inFeatures,
      paddedChannels: storedChannels(inFeatures),
      taps: kernel ** 2,
      outOffset: 0,
      src: resident('weight staging', staging, 0, alignTo(byteLength, 4)),
      out,
    });
    const plan = await Plan.compile(this.#device, this.#arena, {
      label: `pack ${id}`,
      storage: this.#storage,
      steps: [{ kind: 'always', dispatch }],
      feeds: [],
      results: [],
    });
    const encoder = gpu.createCommandEncoder();
    plan.encode(encoder);
    gpu.queue.submit([encoder.finish()]);
    plan.close();
    this.#advance(byteLength);
    this.#queuedBytes += byteLength;
    if (this.#queuedBytes >= MAX_QUEUED_BYTES) await this.#drain();
  }

  async #drain(): Promise<void> {
    this.#queuedBytes = 0;
    await this.#device.settle(() => this.#device.gpu.queue.onSubmittedWorkDone());
    // Lets sockets and timers of this process run between chunks.
    await sleep(0);
  }

  #advance(bytes: number): void {
    this.#done += bytes;
    this.#onBytes(this.#done, this.#total);
  }
}
