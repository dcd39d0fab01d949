/**
 * The frozen weights of one UNet on the GPU: read from the file in chunks, packed by a kernel, never written again.
 * Owns their buffers; knows files by their open handle, not by path or name.
 */
import { UnetdError } from '../errors.ts';
import { type Device, Usage } from '../gpu/device.ts';
import { alignTo, type Operand, type Resident } from '../gpu/kernel.ts';
import { toF32 } from '../half.ts';
import { packOf } from '../kernels/pack.ts';
import { leastPanels, PANEL, panelsPerBinding, storageOf, type WeightFormat } from '../kernels/panel.ts';
import type { SafetensorsFile, TensorEntry } from '../safetensors.ts';
import type { UNetConfig } from './config.ts';
import { type Bundle, layersOf, type Part, partsOf } from './layers.ts';
import type { Matrix } from './matmul.ts';
import { checkDtypes, heldBundles, isMatrix, placeOf, vectorPlaces } from './packed.ts';
import { Staging } from './staging.ts';
import { type BundledLayers, storedChannels, type WeightSource } from './tensors.ts';

/** File bytes sent to the GPU at a time. */
const CHUNK_BYTES = 16 * 1024 * 1024;

/** Progress in file bytes. */
export type OnBytes = (done: number, total: number) => void;

/** What a load makes: everything by name, and the buffers that hold it. */
interface Loaded {
  readonly matrices: ReadonlyMap<string, Matrix>;
  readonly vectors: ReadonlyMap<string, Operand>;
  readonly bundles: ReadonlyMap<string, BundledLayers>;
  readonly buffers: readonly GPUBuffer[];
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
  readonly #loaded: Loaded;

  private constructor(loaded: Loaded) {
    this.#loaded = loaded;
    this.sizeBytes = loaded.buffers.reduce((sum, { size }) => sum + size, 0);
  }

  /**
   * Uploads every tensor of the config. `entryOf` finds a tensor of the file by its LDM name. ERR_OUT_OF_MEMORY,
   * ERR_SAFETENSORS (the file shrank), ERR_MODEL_INVALID (a dtype that cannot be packed).
   */
  static async load(
    device: Device,
    format: WeightFormat,
    config: UNetConfig,
    file: SafetensorsFile,
    entryOf: (ldmName: string) => TensorEntry,
    onBytes: OnBytes = () => {},
  ): Promise<Weights> {
    const loader = new Loader(device, format, config, file, entryOf, onBytes);
    try {
      return new Weights(await loader.load());
    } catch (error) {
      loader.discard();
      throw error;
    } finally {
      loader.close();
    }
  }

  matrix(id: string): Matrix {
    const found = this.#loaded.matrices.get(id);
    if (!found) throw new Error(`the model has no layer ${id}`);
    return found;
  }

  vector(name: string): Operand | undefined {
    return this.#loaded.vectors.get(name);
  }

  bundle(id: string): BundledLayers | undefined {
    return this.#loaded.bundles.get(id);
  }

  /** Every weight buffer, to read them back. */
  buffers(): readonly GPUBuffer[] {
    return this.#loaded.buffers;
  }

  close(): void {
    for (const buffer of this.buffers()) buffer.destroy();
  }
}

/** One load: the way to the GPU, and what has been made so far. */
class Loader {
  readonly #device: Device;
  readonly #format: WeightFormat;
  readonly #config: UNetConfig;
  readonly #file: SafetensorsFile;
  readonly #entryOf: (ldmName: string) => TensorEntry;
  readonly #onBytes: OnBytes;
  readonly #chunkBytes: number;
  readonly #made: GPUBuffer[] = [];
  #staging: Staging | undefined;
  #done = 0;
  #total = 0;

  constructor(
    device: Device,
    format: WeightFormat,
    config: UNetConfig,
    file: SafetensorsFile,
    entryOf: (ldmName: string) => TensorEntry,
    onBytes: OnBytes,
  ) {
    this.#device = device;
    this.#format = format;
    this.#config = config;
    this.#file = file;
    this.#entryOf = entryOf;
    this.#onBytes = onBytes;
    const widest = partsOf(config).map((part) => {
      const panels = isMatrix(part) ? leastPanels(placeOf(part, format).panelBytes, device.capabilities) : 0;
      return panels * PANEL * part.inFeatures * part.kernel ** 2 * 4;
    });
    this.#chunkBytes = Math.max(CHUNK_BYTES, ...widest.map((bytes) => alignTo(bytes, 16)));
  }

  async load(): Promise<Loaded> {
    checkDtypes(this.#config, this.#entryOf);
    const parts = partsOf(this.#config);
    const held = heldBundles(this.#config, this.#format, this.#device.capabilities);
    this.#total = parts.reduce(
      (sum, { id, bias }) =>
        sum + this.#entryOf(`${id}.weight`).byteLength + (bias ? this.#entryOf(`${id}.bias`).byteLength : 0),
      0,
    );
    this.#staging = await Staging.create(this.#device, storageOf(this.#format), this.#chunkBytes);
    const { vectors, biases } = await this.#loadVectors(parts, held);
    const { matrices, bundles } = await this.#loadMatrices(parts, held, biases);
    await this.#staging.done();
    return { matrices, vectors, bundles, buffers: this.#made };
  }

  discard(): void {
    for (const buffer of this.#made) buffer.destroy();
  }

  close(): void {
    this.#staging?.close();
  }

  async #create(label: string, sizeBytes: number): Promise<GPUBuffer> {
    const usage = Usage.STORAGE | Usage.COPY_DST | Usage.COPY_SRC;
    const buffer = await this.#device.guarded(`loading ${label}`, () =>
      this.#device.createBuffer(label, sizeBytes, usage),
    );
    this.#made.push(buffer);
    return buffer;
  }

  /** Biases and norm parameters in f32, and once more the biases of each bundle without gaps, all in one buffer. */
  async #loadVectors(
    parts: readonly Part[],
    held: readonly Bundle[],
  ): Promise<{ vectors: ReadonlyMap<string, Operand>; biases: ReadonlyMap<string, Operand> }> {
    const alignment = this.#device.capabilities.offsetAlignment;
    const { vectors: places, biases: again, totalBytes } = vectorPlaces(parts, held, alignment);
    const all = new Uint8Array(totalBytes);
    for (const { name, offset } of places) {
      const entry = this.#entryOf(name);
      const values = toF32(entry.dtype, await this.#file.read(entry.name));
      all.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), offset);
      this.#advance(entry.byteLength);
    }
    const offsets = new Map(places.map(({ name, offset }) => [name, offset]));
    for (const { bundle, offset } of again) {
      let at = offset;
      for (const { id, outFeatures } of bundle.parts) {
        const from = offsets.get(`${id}.bias`)!;
        all.copyWithin(at, from, from + outFeatures * 4);
        at += outFeatures * 4;
      }
    }
    const buffer = await this.#create('vectors', totalBytes);
    this.#device.gpu.queue.writeBuffer(buffer, 0, all);
    return {
      vectors: new Map(
        places.map(({ name, offset, sizeBytes }) => [
          name,
          tensorOf(name, 0, resident(name, buffer, offset, sizeBytes)),
        ]),
      ),
      biases: new Map(
        again.map(({ bundle: { id }, offset, sizeBytes }) => [id, resident(id, buffer, offset, sizeBytes)]),
      ),
    };
  }

  async #loadMatrices(
    parts: readonly Part[],
    held: readonly Bundle[],
    biases: ReadonlyMap<string, Operand>,
  ): Promise<Pick<Loaded, 'matrices' | 'bundles'>> {
    const slots = new Map(layersOf(this.#config).map((layer, slot) => [layer.id, slot]));
    const matrices = new Map<string, Matrix>();
    const bundles = new Map<string, BundledLayers>();
    const bundled = new Set(held.flatMap((bundle) => bundle.parts.map(({ id }) => id)));
    const alone = parts.filter((part) => isMatrix(part) && !bundled.has(part.id));
    for (const { id, parts: members } of [
      ...held,
      ...alone.map((part) => ({ id: part.id, parts: [part] })),
    ]) {
      const sizes = members.map((part) => placeOf(part, this.#format).sizeBytes);
      const buffer = await this.#create(
        id,
        sizes.reduce((sum, bytes) => sum + bytes, 0),
      );
      let start = 0;
      for (const [i, part] of members.entries()) {
        matrices.set(part.id, await this.#loadMatrix(part, slots.get(part.id) ?? -1, buffer, start));
        start += sizes[i]!;
      }
      if (members.length === 1) continue;
      const [{ inFeatures, kernel }] = members as [Part];
      const outFeatures = members.reduce((sum, part) => sum + part.outFeatures, 0);
      const range = (offset: number, bytes: number): Operand => resident(id, buffer, offset, bytes);
      const { format } = matrices.get(members[0]!.id)!;
      const matrix = { slot: -1, format, inFeatures, outFeatures, kernel, range };
      bundles.set(id, { matrix, bias: biases.get(id) });
    }
    return { matrices, bundles };
  }

  /** Packs a matrix into the bytes of `buffer` from `start` on. */
  async #loadMatrix(part: Part, slot: number, buffer: GPUBuffer, start: number): Promise<Matrix> {
    const { id, inFeatures, outFeatures, kernel } = part;
    const entry = this.#entryOf(`${id}.weight`);
    const { format, panels, panelBytes } = placeOf(part, this.#format);
    const rowBytes = entry.byteLength / outFeatures;
    const { capabilities } = this.#device;
    const least = Math.min(panels, leastPanels(panelBytes, capabilities));
    const widest = least * Math.max(panelBytes, rowBytes * PANEL);
    const most = capabilities.maxBindingBytes;
    if (widest > most)
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `${least * PANEL} columns of ${entry.name} take ${widest} bytes, the adapter binds at most ${most}: it cannot hold this model`,
        { tensor: entry.name, needed: widest, limit: most },
      );
    // A chunk is bound twice, as the file has it and packed.
    const inChunk = Math.floor(Math.min(most, this.#chunkBytes) / (rowBytes * PANEL) / least) * least;
    const perChunk = Math.min(inChunk, panelsPerBinding(panels, panelBytes, capabilities));
    for (let panel = 0; panel < panels; panel += perChunk) {
      const count = Math.min(perChunk, panels - panel);
      const rows = Math.min(count * PANEL, outFeatures - panel * PANEL);
      const out = resident(id, buffer, start + panel * panelBytes, count * panelBytes);
      await this.#packRows(part, format, entry, panel * PANEL * rowBytes, rows, rows * rowBytes, out);
    }
    const range = (offset: number, sizeBytes: number): Operand =>
      tensorOf(`${id}.weight`, offset, resident(id, buffer, start + offset, sizeBytes));
    return { slot, format, inFeatures, outFeatures, kernel, range };
  }

  async #packRows(
    { id, inFeatures, kernel }: Part,
    format: WeightFormat,
    entry: TensorEntry,
    start: number,
    rows: number,
    byteLength: number,
    out: Resident,
  ): Promise<void> {
    const shape = { channels: inFeatures, paddedChannels: storedChannels(inFeatures), taps: kernel ** 2 };
    await this.#staging!.add(
      byteLength,
      (target) => this.#file.readInto(entry, target, start),
      (src) => packOf({ label: id, dtype: entry.dtype, rows, ...shape, outPanel: 0, format, src, out }),
    );
    this.#advance(byteLength);
  }

  #advance(bytes: number): void {
    this.#done += bytes;
    this.#onBytes(this.#done, this.#total);
  }
}
