/** How large a frame from a client may be, and its JSON, which takes many times its length in memory and time. Decodes nothing. */
import { UnetdError } from '../errors.ts';
import { LENGTH_BYTES } from '../safetensors-header.ts';

const MAX_TEXT_BYTES = 1024 * 1024;
/** About 30,000 tensors, as many as an upload may have. */
const MAX_HEADER_BYTES = 4 * 1024 * 1024;

/** ERR_TOO_LARGE. To be called before the frame is decoded. */
export function checkFrameSize(frame: string | Uint8Array, maxMessageBytes: number): void {
  if (typeof frame === 'string') {
    const limit = Math.min(MAX_TEXT_BYTES, maxMessageBytes);
    atMost(Buffer.byteLength(frame), limit, 'A text frame', 'send tensors in a binary frame');
    return;
  }
  atMost(frame.byteLength, maxMessageBytes, 'A frame', 'send fewer images, or a file in parts');
  atMost(statedHeaderBytes(frame), MAX_HEADER_BYTES, 'The header of a frame', 'send fewer tensors at once');
}

function atMost(bytes: number, limit: number, what: string, cure: string): void {
  if (bytes <= limit) return;
  throw new UnetdError('ERR_TOO_LARGE', `${what} may have ${limit} bytes, this one has ${bytes}; ${cure}.`, {
    bytes,
    limit,
  });
}

/** What the frame says, or 0 where it cannot: then decoding says what is wrong. A lie longer than the frame is its business too. */
function statedHeaderBytes(frame: Uint8Array): number {
  if (frame.byteLength < LENGTH_BYTES) return 0;
  const view = new DataView(frame.buffer, frame.byteOffset, LENGTH_BYTES);
  return Math.min(frame.byteLength, Number(view.getBigUint64(0, true)));
}
