/**
 * Safetensors files: decode and encode in memory, read from disk in pieces, and the digest of their tensors.
 * Knows no model and converts no numbers (see half.ts). What a header may say is checked in safetensors-header.ts.
 */
import { createHash, type Hash } from 'node:crypto';
import type { BigIntStats } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { basename } from 'node:path';
import {
  DTYPE_BYTES,
  type Dtype,
  elementsOf,
  headerLength,
  headOf,
  isDtype,
  LENGTH_BYTES,
  nameFault,
  parseHeader,
  refuse,
  type SafetensorsHeader,
  type TensorEntry,
} from './safetensors-header.ts';

export { DTYPE_BYTES, type Dtype, isDtype, type TensorEntry } from './safetensors-header.ts';

/** A tensor in memory: dense, row-major, little endian. `data` need not be aligned to its elements. */
export interface TensorView {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly data: Uint8Array;
}

/** A decoded file; the tensors' `data` are views into the given bytes, in the order of their data. */
export interface SafetensorsView {
  readonly metadata: ReadonlyMap<string, string>;
  readonly tensors: ReadonlyMap<string, TensorView>;
}

/** Bytes of one read: the digest of a file holds no more than this in memory. */
const CHUNK_BYTES = 16 * 1024 * 1024;
/** Node refuses single reads of 2 GiB or more. */
const MAX_READ_BYTES = 1024 * 1024 * 1024;

/**
 * The tensors and metadata of a whole file, without copying. `file` names it in messages.
 * ERR_SAFETENSORS where the header contradicts itself, its length or the data; never any other error.
 */
export function decode(bytes: Uint8Array, file = 'in memory'): SafetensorsView {
  const length = headerLength(bytes, bytes.byteLength, file);
  const json = bytes.subarray(LENGTH_BYTES, LENGTH_BYTES + length);
  const { metadata, tensors } = parseHeader(json, bytes.byteLength, file);
  const views = new Map<string, TensorView>();
  for (const { name, dtype, shape, offset, byteLength } of tensors.values()) {
    views.set(name, { name, dtype, shape, data: bytes.subarray(offset, offset + byteLength) });
  }
  return { metadata, tensors: views };
}

/** Ascending order of code points, which is the order of UTF-8 bytes (JavaScript's own sorts UTF-16 units). */
function byName(a: { readonly name: string }, b: { readonly name: string }): number {
  return Buffer.compare(Buffer.from(a.name), Buffer.from(b.name));
}

function checkTensor({ name, dtype, shape, data }: TensorView, file: string): void {
  const fault = name === '__metadata__' ? 'the name "__metadata__" is reserved' : nameFault(name);
  if (fault !== null) refuse(file, fault, name);
  if (!isDtype(dtype)) refuse(file, `unknown dtype ${JSON.stringify(dtype)}`, name);
  const count = elementsOf(shape);
  if (count === null || count * DTYPE_BYTES[dtype] !== data.byteLength) {
    refuse(file, `${dtype} [${shape}] does not take the ${data.byteLength} bytes given`, name);
  }
}

/**
 * A whole file. Tensors are laid out by falling element size, then name, so that a reader finds each aligned: equal
 * input gives equal bytes whatever its order. ERR_SAFETENSORS where a name appears twice or data does not fit its shape.
 */
export function encode(
  tensors: Iterable<TensorView>,
  metadata: ReadonlyMap<string, string> = new Map(),
): Uint8Array {
  const file = 'to encode';
  const sorted = [...tensors];
  for (const tensor of sorted) checkTensor(tensor, file);
  sorted.sort((a, b) => DTYPE_BYTES[b.dtype] - DTYPE_BYTES[a.dtype] || byName(a, b));
  const parts: string[] = [];
  if (metadata.size > 0) parts.push(`"__metadata__":${metadataJson(metadata, file)}`);
  const seen = new Set<string>();
  let end = 0;
  for (const { name, dtype, shape, data } of sorted) {
    if (seen.has(name)) refuse(file, 'the name appears twice', name);
    seen.add(name);
    const begin = end;
    end += data.byteLength;
    parts.push(
      `${JSON.stringify(name)}:{"dtype":"${dtype}","shape":[${shape}],"data_offsets":[${begin},${end}]}`,
    );
  }
  const head = headOf(`{${parts.join(',')}}`, file);
  const out = new Uint8Array(head.byteLength + end);
  out.set(head);
  let at = head.byteLength;
  for (const { data } of sorted) {
    out.set(data, at);
    at += data.byteLength;
  }
  return out;
}

function metadataJson(metadata: ReadonlyMap<string, string>, file: string): string {
  const fields = [...metadata].map(([key, value]) => {
    if (key === '__proto__') refuse(file, '__metadata__ holds the key "__proto__", which is not allowed');
    if (/\p{Surrogate}/u.test(key + value))
      refuse(file, `__metadata__[${JSON.stringify(key)}] is not valid Unicode`);
    return `${JSON.stringify(key)}:${JSON.stringify(value)}`;
  });
  return `{${fields.join(',')}}`;
}

function hashHead(hash: Hash, { name, dtype, shape }: Pick<TensorView, 'name' | 'dtype' | 'shape'>): void {
  hash.update(`${name}\0${dtype}\0${shape.join(',')}\0`, 'utf8');
}

/**
 * Lower-case hex SHA-256 over the tensors in ascending order of name (code points): for each the UTF-8 bytes of
 * `name\0dtype\0shape\0` (shape joined by `,`), then its data. Independent of framing and metadata (docs/PROTOCOL.md).
 */
export function digest(tensors: Iterable<TensorView>): string {
  const hash = createHash('sha256');
  for (const tensor of [...tensors].sort(byName)) {
    hashHead(hash, tensor);
    hash.update(tensor.data);
  }
  return hash.digest('hex');
}

/** An open file of which only the header is in memory. The owner calls `close`. */
export class SafetensorsFile {
  /** Base name, as messages show it: paths stay on the server. */
  readonly name: string;
  readonly metadata: ReadonlyMap<string, string>;
  readonly tensors: ReadonlyMap<string, TensorEntry>;
  readonly #handle: FileHandle;
  readonly #sizeBytes: number;
  /** When it was last written to, as it was opened. */
  readonly #mtimeNs: bigint;
  readonly #aheadBytes: number;
  /** What was read last, of the file from `start` on. */
  #ahead = { start: 0, bytes: new Uint8Array() };

  private constructor(
    name: string,
    header: SafetensorsHeader,
    handle: FileHandle,
    { size, mtimeNs }: Pick<BigIntStats, 'size' | 'mtimeNs'>,
    aheadBytes: number,
  ) {
    this.name = name;
    this.metadata = header.metadata;
    this.tensors = header.tensors;
    this.#handle = handle;
    this.#sizeBytes = Number(size);
    this.#mtimeNs = mtimeNs;
    this.#aheadBytes = aheadBytes;
  }

  /**
   * Opens a file and checks its header. Where many small tensors are to be read, `aheadBytes` at a time spare it as many
   * turns of the event loop. ERR_SAFETENSORS, also where the file cannot be opened.
   */
  static async open(path: string, aheadBytes = 0): Promise<SafetensorsFile> {
    const name = basename(path);
    const handle = await open(path, 'r').catch((error: NodeJS.ErrnoException) =>
      refuse(name, `it cannot be opened (${error.code ?? error.message})`),
    );
    try {
      const stats = await handle.stat({ bigint: true });
      const size = Number(stats.size);
      const first = new Uint8Array(LENGTH_BYTES);
      await fill(handle, first.subarray(0, Math.min(size, LENGTH_BYTES)), 0, name);
      const json = new Uint8Array(headerLength(first, size, name));
      await fill(handle, json, LENGTH_BYTES, name);
      return new SafetensorsFile(name, parseHeader(json, size, name), handle, stats, aheadBytes);
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  /** All bytes of one tensor, in memory of their own. ERR_SAFETENSORS where there is no such tensor. */
  async read(name: string): Promise<Uint8Array> {
    const entry = this.tensors.get(name) ?? refuse(this.name, 'there is no such tensor', name);
    const data = new Uint8Array(entry.byteLength);
    await this.readInto(entry, data, 0);
    return data;
  }

  /**
   * Fills `target` with the tensor's bytes from `start` on. ERR_SAFETENSORS where that reaches past the tensor's end,
   * or where the file has shrunk since it was opened.
   */
  async readInto(entry: TensorEntry, target: Uint8Array, start: number): Promise<void> {
    const end = start + target.byteLength;
    if (!Number.isSafeInteger(start) || start < 0 || end > entry.byteLength) {
      refuse(this.name, `bytes ${start} to ${end} were asked for, it has ${entry.byteLength}`, entry.name);
    }
    const from = entry.offset + start;
    if (target.byteLength >= this.#aheadBytes) return fill(this.#handle, target, from, this.name);
    let ahead = this.#ahead;
    if (from < ahead.start || from + target.byteLength > ahead.start + ahead.bytes.byteLength) {
      ahead = { start: from, bytes: new Uint8Array(Math.min(this.#aheadBytes, this.#sizeBytes - from)) };
      await fill(this.#handle, ahead.bytes, from, this.name);
      this.#ahead = ahead;
    }
    target.set(ahead.bytes.subarray(from - ahead.start, from - ahead.start + target.byteLength));
  }

  /** The digest of all tensors, read in pieces. */
  async digest(): Promise<string> {
    const hash = createHash('sha256');
    const chunk = new Uint8Array(CHUNK_BYTES);
    for (const entry of [...this.tensors.values()].sort(byName)) {
      hashHead(hash, entry);
      for (let start = 0; start < entry.byteLength; start += chunk.byteLength) {
        const piece = chunk.subarray(0, Math.min(chunk.byteLength, entry.byteLength - start));
        await this.readInto(entry, piece, start);
        hash.update(piece);
      }
    }
    return hash.digest('hex');
  }

  /** ERR_SAFETENSORS where the file was written to since it was opened: what was read may be of two versions. */
  async checkUnchanged(): Promise<void> {
    const { mtimeNs } = await this.#handle.stat({ bigint: true });
    if (mtimeNs !== this.#mtimeNs)
      refuse(this.name, 'it was written to while it was read; try again once it is complete');
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }
}

/** Reads until `target` is full. */
async function fill(handle: FileHandle, target: Uint8Array, position: number, file: string): Promise<void> {
  for (let done = 0; done < target.byteLength; ) {
    const length = Math.min(target.byteLength - done, MAX_READ_BYTES);
    const { bytesRead } = await handle
      .read(target, done, length, position + done)
      .catch((error: NodeJS.ErrnoException) =>
        refuse(file, `it cannot be read (${error.code ?? error.message})`),
      );
    if (bytesRead === 0) refuse(file, `it ended at byte ${position + done} while being read`);
    done += bytesRead;
  }
}
