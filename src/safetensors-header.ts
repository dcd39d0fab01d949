/**
 * The header of a safetensors file (https://huggingface.co/docs/safetensors): an 8-byte little-endian length, then a
 * JSON object of tensors. Checks every statement it makes against the others and against the size of the file.
 * Reads no tensor data and no files.
 */
import { UnetdError } from './errors.ts';
import { parseStrictJson, type StrictJson, type StrictJsonObject } from './strict-json.ts';

/** Bytes per element of every dtype that is read and written. */
export const DTYPE_BYTES = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  U16: 2,
  I16: 2,
  U32: 4,
  I32: 4,
  U64: 8,
  I64: 8,
  F16: 2,
  BF16: 2,
  F32: 4,
  F64: 8,
  F8_E4M3: 1,
  F8_E5M2: 1,
} as const;

export type Dtype = keyof typeof DTYPE_BYTES;

/** Where a tensor lies. `offset` counts bytes from the start of the file. */
export interface TensorEntry {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly byteLength: number;
}

export interface SafetensorsHeader {
  readonly metadata: ReadonlyMap<string, string>;
  /** In the order of their data. */
  readonly tensors: ReadonlyMap<string, TensorEntry>;
}

/** The reference implementation's limit, too. */
export const MAX_HEADER_BYTES = 100_000_000;
export const LENGTH_BYTES = 8;

const FIELDS: ReadonlySet<string> = new Set(['dtype', 'shape', 'data_offsets']);

export function isDtype(name: string): name is Dtype {
  return Object.hasOwn(DTYPE_BYTES, name);
}

/** A name or a value as a message shows it: quoted, at most 120 characters. */
export function quote(value: unknown): string {
  const text = JSON.stringify(value instanceof Map ? Object.fromEntries(value) : value) ?? String(value);
  return text.length > 120 ? `${text.slice(0, 117)}...` : text;
}

/** Always throws ERR_SAFETENSORS, naming the file and, where one is at fault, the tensor. */
export function refuse(file: string, message: string, tensor?: string): never {
  const where = tensor === undefined ? '' : `, tensor ${quote(tensor)}`;
  const details = tensor === undefined ? { file } : { file, tensor };
  throw new UnetdError('ERR_SAFETENSORS', `Bad safetensors file ${quote(file)}${where}: ${message}`, details);
}

/** Why a name cannot be used, or null. NUL separates names in digests; `__proto__` can only be an attack. */
export function nameFault(name: string): string | null {
  if (name === '__proto__') return 'the name "__proto__" is not allowed';
  if (name.includes('\0')) return `the name ${quote(name)} holds a NUL character`;
  return /\p{Surrogate}/u.test(name) ? `the name ${quote(name)} is not valid Unicode` : null;
}

/** Elements of a shape, or null where a dimension is no whole number >= 0 or the product is not a safe integer. */
export function elementsOf(shape: readonly unknown[]): number | null {
  let count = 1;
  for (const size of shape) {
    if (typeof size !== 'number' || !Number.isSafeInteger(size) || size < 0 || Object.is(size, -0))
      return null;
    count *= size;
    if (!Number.isSafeInteger(count)) return null;
  }
  return count;
}

/** The length that the first 8 bytes state, checked against the size of the file and the limit. */
export function headerLength(first: Uint8Array, fileBytes: number, file: string): number {
  if (fileBytes < LENGTH_BYTES)
    refuse(file, `it has ${fileBytes} bytes, and the header's length alone takes 8`);
  const pickle = looksLikePickle(first);
  const length = new DataView(first.buffer, first.byteOffset, LENGTH_BYTES).getBigUint64(0, true);
  if (pickle && length > BigInt(MAX_HEADER_BYTES)) {
    refuse(file, 'this is a PyTorch pickle, which could run code when opened; convert it to safetensors');
  }
  if (length > BigInt(MAX_HEADER_BYTES)) {
    refuse(file, `the header is said to have ${length} bytes, at most ${MAX_HEADER_BYTES} are read`);
  }
  const end = LENGTH_BYTES + Number(length);
  if (end > fileBytes)
    refuse(file, `the header ends at byte ${end}, the file at ${fileBytes}: it is truncated`);
  return Number(length);
}

/** A zip archive or a bare pickle stream (protocols 2 to 5), as `torch.save` writes them. */
export function looksLikePickle(first: Uint8Array): boolean {
  const zip = first[0] === 0x50 && first[1] === 0x4b && first[2] === 3 && first[3] === 4;
  return zip || (first[0] === 0x80 && first[1]! >= 2 && first[1]! <= 5);
}

/** Parses and checks the JSON part. `fileBytes` is the size of the whole file, `dataStart` where the data begins. */
export function parseHeader(json: Uint8Array, fileBytes: number, file: string): SafetensorsHeader {
  const dataStart = LENGTH_BYTES + json.byteLength;
  let root: StrictJson;
  try {
    root = parseStrictJson(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(json));
  } catch (error) {
    return refuse(file, `the header is not valid JSON: ${error instanceof Error ? error.message : error}`);
  }
  if (!(root instanceof Map)) return refuse(file, `the header is ${quote(root)}, not a JSON object`);
  const entries: TensorEntry[] = [];
  let metadata: ReadonlyMap<string, string> = new Map();
  for (const [name, value] of root as StrictJsonObject) {
    if (name === '__metadata__') metadata = parseMetadata(value, file);
    else entries.push(parseEntry(name, value, dataStart, file));
  }
  entries.sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength);
  checkLayout(entries, dataStart, fileBytes, file);
  return { metadata, tensors: new Map(entries.map((entry) => [entry.name, entry])) };
}

function parseMetadata(value: StrictJson, file: string): ReadonlyMap<string, string> {
  if (!(value instanceof Map))
    return refuse(file, `__metadata__ is ${quote(value)}, not an object of strings`);
  const metadata = new Map<string, string>();
  for (const [key, text] of value as StrictJsonObject) {
    if (key === '__proto__') refuse(file, '__metadata__ holds the key "__proto__", which is not allowed');
    if (typeof text !== 'string')
      return refuse(file, `__metadata__[${quote(key)}] is ${quote(text)}, not a string`);
    metadata.set(key, text);
  }
  return metadata;
}

function parseEntry(name: string, value: StrictJson, dataStart: number, file: string): TensorEntry {
  const fault = nameFault(name);
  if (fault !== null) refuse(file, fault, name);
  if (!(value instanceof Map)) return refuse(file, `its entry is ${quote(value)}, not an object`, name);
  for (const field of value.keys())
    if (!FIELDS.has(field)) refuse(file, `unknown field ${quote(field)}`, name);
  for (const field of FIELDS) if (!value.has(field)) refuse(file, `the field "${field}" is missing`, name);
  const dtype: unknown = value.get('dtype');
  const shape: unknown = value.get('shape');
  const offsets: unknown = value.get('data_offsets');
  if (typeof dtype !== 'string' || !isDtype(dtype))
    return refuse(file, `unknown dtype ${quote(dtype)}`, name);
  if (!Array.isArray(shape)) return refuse(file, `the shape is ${quote(shape)}, not a list`, name);
  const count = elementsOf(shape);
  if (count === null || !Number.isSafeInteger(count * DTYPE_BYTES[dtype])) {
    return refuse(file, `the shape ${quote(shape)} is not made of whole numbers with a usable product`, name);
  }
  if (
    !Array.isArray(offsets) ||
    offsets.length !== 2 ||
    elementsOf([offsets[0]]) === null ||
    elementsOf([offsets[1]]) === null
  ) {
    return refuse(file, `data_offsets is ${quote(offsets)}, not two whole numbers`, name);
  }
  const [begin, end] = offsets as [number, number];
  if (begin > end) refuse(file, `data_offsets ${quote(offsets)} end before they begin`, name);
  const byteLength = count * DTYPE_BYTES[dtype];
  if (end - begin !== byteLength) {
    refuse(
      file,
      `${dtype} ${quote(shape)} takes ${byteLength} bytes, data_offsets ${quote(offsets)} hold ${end - begin}`,
      name,
    );
  }
  return { name, dtype, shape, offset: dataStart + begin, byteLength };
}

/** The tensors must fill the data exactly: no overlap, no hole, nothing behind the last. */
function checkLayout(
  entries: readonly TensorEntry[],
  dataStart: number,
  fileBytes: number,
  file: string,
): void {
  let cursor = dataStart;
  for (const [index, { name, offset, byteLength }] of entries.entries()) {
    const before = index === 0 ? 'the start' : `the end of ${quote(entries[index - 1]!.name)}`;
    const at = `begins at byte ${offset - dataStart} of the data, ${before} is at ${cursor - dataStart}`;
    if (offset < cursor) refuse(file, `${at}: they overlap`, name);
    if (offset > cursor) refuse(file, `${at}: a hole`, name);
    cursor += byteLength;
    if (cursor > fileBytes) {
      refuse(file, `ends at byte ${cursor} of the file, which has ${fileBytes}: the file is truncated`, name);
    }
  }
  if (cursor !== fileBytes) {
    refuse(
      file,
      `the last tensor ends at byte ${cursor}, the file at ${fileBytes}: ${fileBytes - cursor} trailing bytes`,
    );
  }
}

/**
 * What a file begins with: the header's length and the header itself, filled up to a multiple of 8 bytes. ERR_SAFETENSORS where it
 * is too long to be read.
 */
export function headOf(header: string, file: string): Uint8Array {
  const json = Buffer.from(header);
  const headerBytes = Math.ceil(json.byteLength / 8) * 8;
  if (headerBytes > MAX_HEADER_BYTES)
    refuse(file, `the header takes ${headerBytes} of ${MAX_HEADER_BYTES} bytes`);
  const head = new Uint8Array(LENGTH_BYTES + headerBytes).fill(0x20);
  new DataView(head.buffer).setBigUint64(0, BigInt(headerBytes), true);
  head.set(json, LENGTH_BYTES);
  return head;
}
