/**
 * One upload while it arrives: a safetensors file that is written tensor by tensor, its header last, into room left for it. Knows no
 * parts, connections or quota (`uploads.ts` does).
 */
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { UnetdError } from '../errors.ts';
import { SafetensorsFile, type TensorView } from '../safetensors.ts';
import { LENGTH_BYTES } from '../safetensors-header.ts';

/** Room for a header that is not known yet: about 30,000 tensors. The format allows trailing spaces. */
const HEADER_BYTES = 4 * 1024 * 1024;

export class Spool {
  readonly #path: string;
  readonly #handle: Promise<FileHandle>;
  readonly #headerBytes: number;
  /** Tensor -> its entry in the header. */
  readonly #entries = new Map<string, string>();
  #bytes = 0;

  /** Makes the file. `all` are its tensors where they are known already: the header then takes no more than it needs. */
  constructor(path: string, all?: readonly TensorView[]) {
    this.#path = path;
    this.#handle = open(path, 'wx+', 0o600);
    this.#headerBytes = all === undefined ? HEADER_BYTES : exactHeaderBytes(all);
  }

  get sizeBytes(): number {
    return LENGTH_BYTES + this.#headerBytes + this.#bytes;
  }

  get tensors(): number {
    return this.#entries.size;
  }

  /** ERR_BAD_REQUEST for a tensor that is there already. */
  async write(tensor: TensorView): Promise<void> {
    const { name, data } = tensor;
    if (this.#entries.has(name)) {
      const message = `Tensor "${name}" came in two parts of one upload; begin again.`;
      throw new UnetdError('ERR_BAD_REQUEST', message);
    }
    this.#entries.set(name, headerEntry(tensor, this.#bytes));
    const start = this.sizeBytes;
    await writeAll(await this.#handle, data, start);
    this.#bytes += data.byteLength;
  }

  /** Writes the header and gives the digest of what is in the file. ERR_TOO_LARGE where the header needs more than its room. */
  async seal(): Promise<string> {
    const json = Buffer.from(`{${[...this.#entries.values()].join(',')}}`);
    if (json.byteLength > this.#headerBytes) {
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `The header of the ${this.tensors} tensors takes ${json.byteLength} bytes, at most ${this.#headerBytes}; upload fewer, or put the file into a folder of the server.`,
      );
    }
    const head = Buffer.alloc(LENGTH_BYTES + this.#headerBytes, ' ');
    head.writeBigUInt64LE(BigInt(this.#headerBytes));
    json.copy(head, LENGTH_BYTES);
    await writeAll(await this.#handle, head, 0);
    const file = await SafetensorsFile.open(this.#path);
    try {
      return await file.digest();
    } finally {
      await file.close();
    }
  }

  /** Closes the file and gives it its final name. */
  async move(path: string): Promise<void> {
    await (await this.#handle).close();
    await rename(this.#path, path);
  }

  /** Removes the file; one that was moved stays. */
  async discard(): Promise<void> {
    await this.#handle.then((handle) => handle.close()).catch(() => {});
    await rm(this.#path, { force: true });
  }
}

async function writeAll(handle: FileHandle, data: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < data.byteLength; )
    done += (await handle.write(data, done, data.byteLength - done, position + done)).bytesWritten;
}

function headerEntry({ name, dtype, shape, data }: TensorView, offset: number): string {
  const entry = { dtype, shape, data_offsets: [offset, offset + data.byteLength] };
  return `${JSON.stringify(name)}:${JSON.stringify(entry)}`;
}

/** What the header of these tensors takes, in order and padded to 8. */
function exactHeaderBytes(tensors: readonly TensorView[]): number {
  let offset = 0;
  const entries = tensors.map((tensor) => {
    const entry = headerEntry(tensor, offset);
    offset += tensor.data.byteLength;
    return entry;
  });
  return Math.ceil(Buffer.byteLength(`{${entries.join(',')}}`) / 8) * 8;
}
