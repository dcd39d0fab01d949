/**
 * Safetensors files, half floats and upload digests, written from docs/PROTOCOL.md alone.
 * It is not the project's own reader: it shares no line with `src/`, so that the document is what is tested.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';

export interface Tensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly data: Uint8Array;
}

export type Tensors = ReadonlyMap<string, Tensor>;

export interface File {
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: Tensors;
}

/** Bytes of a file: 8 bytes of length, the header padded with spaces to a multiple of 8, the data in the map's order. */
export function encode(metadata: Readonly<Record<string, string>>, tensors: Tensors): Buffer {
  let offset = 0;
  const fields = [`"__metadata__":${JSON.stringify(metadata)}`];
  for (const [name, { dtype, shape, data }] of tensors) {
    const entry = { dtype, shape, data_offsets: [offset, offset + data.length] };
    fields.push(`${JSON.stringify(name)}:${JSON.stringify(entry)}`);
    offset += data.length;
  }
  return frame(`{${fields.join(',')}}`, ...[...tensors.values()].map((tensor) => tensor.data));
}

/** Any header text, true or not, with any data behind it. */
export function frame(header: string, ...data: readonly Uint8Array[]): Buffer {
  const text = Buffer.from(header);
  const padded = Buffer.concat([text, Buffer.alloc((8 - (text.length % 8)) % 8, ' ')]);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(padded.length));
  return Buffer.concat([length, padded, ...data]);
}

/** Throws unless the tensors cover the data exactly. */
export function decode(bytes: Buffer): File {
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header: unknown = JSON.parse(bytes.subarray(8, start).toString('utf8'));
  const { __metadata__: metadata = {}, ...entries } = header as Record<string, never>;
  const tensors = new Map<string, Tensor>();
  let covered = 0;
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets } = entry as {
      dtype: string;
      shape: number[];
      data_offsets: [number, number];
    };
    const [begin, end] = data_offsets;
    covered += end - begin;
    tensors.set(name, { dtype, shape, data: bytes.subarray(start + begin, start + end) });
  }
  if (covered !== bytes.length - start)
    throw new Error(`tensors cover ${covered} of ${bytes.length - start}`);
  return { metadata, tensors };
}

export function readTensors(path: string): File {
  return decode(readFileSync(path));
}

/** The digest of an upload: over the tensors in ascending order of name, by code points. */
export function digestOf(tensors: Tensors): string {
  const hash = createHash('sha256');
  const names = [...tensors.keys()].sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
  for (const name of names) {
    const { dtype, shape, data } = tensors.get(name)!;
    hash.update(`${name}\0${dtype}\0${shape.join(',')}\0`).update(data);
  }
  return hash.digest('hex');
}

export function f32(shape: readonly number[], values: ArrayLike<number>): Tensor {
  return { dtype: 'F32', shape, data: new Uint8Array(Float32Array.from(values).buffer) };
}

export function f16(shape: readonly number[], values: ArrayLike<number>): Tensor {
  return { dtype: 'F16', shape, data: new Uint8Array(Uint16Array.from(values, toHalf).buffer) };
}

/** Numbers of an F32 or F16 tensor. */
export function valuesOf(tensor: Tensor): Float32Array {
  const bytes = Uint8Array.from(tensor.data).buffer;
  if (tensor.dtype === 'F32') return new Float32Array(bytes);
  return Float32Array.from(new Uint16Array(bytes), fromHalf);
}

function fromHalf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

/** To nearest, ties to even, by scaling to an integer count of the least half in reach. */
function toHalf(value: number): number {
  if (Number.isNaN(value)) return 0x7e00;
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const size = Math.abs(value);
  if (size >= 65520) return sign | 0x7c00;
  const exponent = Math.max(-14, Math.floor(Math.log2(size || 1e-9)));
  const scaled = size / 2 ** (exponent - 10);
  const floor = Math.floor(scaled);
  const up = scaled - floor > 0.5 || (scaled - floor === 0.5 && floor % 2 === 1);
  const count = floor + (up ? 1 : 0);
  return sign | (count < 1024 ? count : ((exponent + 15) << 10) + count - 1024);
}

/** Rows [from, to) of the first axis. */
export function rows(tensor: Tensor, from: number, to: number): Tensor {
  const [count, ...rest] = tensor.shape;
  const size = tensor.data.length / count!;
  return { ...tensor, shape: [to - from, ...rest], data: tensor.data.subarray(from * size, to * size) };
}

/** Norm of the difference over norm of the expected; infinite where a number is not finite or the counts differ. */
export function errorOf(actual: Tensor | undefined, expected: Tensor): number {
  if (!actual || actual.shape.join() !== expected.shape.join()) return Number.POSITIVE_INFINITY;
  const [a, b] = [valuesOf(actual), valuesOf(expected)];
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < b.length; i += 1) {
    if (!Number.isFinite(a[i]!)) return Number.POSITIVE_INFINITY;
    difference += (a[i]! - b[i]!) ** 2;
    norm += b[i]! ** 2;
  }
  return Math.sqrt(difference / norm);
}
