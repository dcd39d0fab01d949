/**
 * Frames to messages and back: a text frame is one JSON object, a binary frame one safetensors file whose metadata holds the
 * JSON object under `req` (client to server) or `res` (server to client). Knows no sockets and no meaning of any field.
 */
import { UnetdError } from '../errors.ts';
import { decode, encode, type SafetensorsView, type TensorView } from '../safetensors.ts';

export type JsonObject = Readonly<Record<string, unknown>>;

/** Which end wrote the frame: `req` comes from clients, `res` from the server. */
export type Direction = 'req' | 'res';

export interface Message {
  readonly header: JsonObject;
  /** Null for a text frame: a text frame has no tensors, a binary frame may have none. */
  readonly tensors: ReadonlyMap<string, TensorView> | null;
}

/** Reads one frame, a string for a text frame. The tensors may share memory with `frame`. Throws ERR_BAD_FRAME only. */
export function decodeFrame(frame: string | Uint8Array, direction: Direction): Message {
  if (typeof frame === 'string') return { header: parseObject(frame, 'The text frame'), tensors: null };
  let file: SafetensorsView;
  try {
    // As a plain array: a Buffer's slice() would not copy.
    file = decode(new Uint8Array(frame.buffer, frame.byteOffset, frame.byteLength), 'frame');
  } catch (error) {
    const reason = UnetdError.from(error).message;
    throw new UnetdError(
      'ERR_BAD_FRAME',
      `The binary frame of ${frame.byteLength} bytes is no valid safetensors file: ${reason}`,
    );
  }
  const text = file.metadata.get(direction);
  if (text === undefined) {
    const found = [...file.metadata.keys()].join(', ') || 'none';
    throw new UnetdError(
      'ERR_BAD_FRAME',
      `The binary frame has no "${direction}" in its __metadata__ (found: ${found.slice(0, 200)}); put the message there as JSON text.`,
    );
  }
  return { header: parseObject(text, `"${direction}" of the binary frame`), tensors: file.tensors };
}

export function encodeText(header: JsonObject): string {
  return JSON.stringify(header);
}

/** A binary frame. ERR_SAFETENSORS where a tensor's shape, dtype and bytes contradict each other. */
export function encodeBinary(
  header: JsonObject,
  tensors: Iterable<TensorView>,
  direction: Direction,
): Uint8Array {
  return encode(tensors, new Map([[direction, JSON.stringify(header)]]));
}

/** The id of a message if it has a usable one: errors about a message are addressed with it. */
export function idOf(header: JsonObject): string | null {
  return typeof header.id === 'string' ? header.id : null;
}

function parseObject(text: string, where: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new UnetdError(
      'ERR_BAD_FRAME',
      `${where} is not JSON: ${error instanceof Error ? error.message.slice(0, 200) : 'unreadable'}`,
    );
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    const found = value === null ? 'null' : Array.isArray(value) ? 'an array' : `a ${typeof value}`;
    throw new UnetdError(
      'ERR_BAD_FRAME',
      `${where} must be a JSON object like {"id":"1","op":"stats"}, got ${found}.`,
    );
  }
  return value as JsonObject;
}
