/**
 * Follows the bytes that a client sends and tells how large each WebSocket message is going to be as soon as a frame's header says so
 * (RFC 6455, section 5.2). Reads headers only, keeps no payload, and refuses nothing: `ws` does both with the same bytes.
 */

/** Two bytes, an extended length of up to eight, a mask of four. */
const MAX_HEADER = 14;
const FIN = 0x80;
const OPCODE = 0x0f;
const FIRST_CONTROL = 0x8;
const MASKED = 0x80;

export interface MessagePart {
  /** Bytes that the header of a data frame announces. */
  readonly bytes: number;
  /** Whether the message ends with this frame. */
  readonly isLast: boolean;
}

export class FrameMeter {
  readonly #header: Uint8Array = new Uint8Array(MAX_HEADER);
  #headerBytes = 0;
  /** Payload of the current frame that is still to come. */
  #left = 0;
  #isInside = false;

  /** Whether a message has begun of which bytes are still to come. */
  get isInside(): boolean {
    return this.#isInside || this.#left > 0;
  }

  /** Takes the next bytes of the connection; the parts are those whose headers end in them. */
  read(chunk: Uint8Array): readonly MessagePart[] {
    const parts: MessagePart[] = [];
    for (let at = 0; at < chunk.byteLength; ) {
      if (this.#left > 0) {
        const step = Math.min(this.#left, chunk.byteLength - at);
        this.#left -= step;
        at += step;
        continue;
      }
      this.#header[this.#headerBytes++] = chunk[at++]!;
      if (this.#headerBytes < this.#headerLength()) continue;
      this.#left = this.#payloadLength();
      this.#headerBytes = 0;
      const first = this.#header[0]!;
      if ((first & OPCODE) >= FIRST_CONTROL) continue;
      const isLast = (first & FIN) !== 0;
      this.#isInside = !isLast;
      parts.push({ bytes: this.#left, isLast });
    }
    return parts;
  }

  #headerLength(): number {
    if (this.#headerBytes < 2) return 2;
    const second = this.#header[1]!;
    const extended = { 126: 2, 127: 8 }[second & ~MASKED] ?? 0;
    return 2 + extended + ((second & MASKED) === 0 ? 0 : 4);
  }

  #payloadLength(): number {
    const view = new DataView(this.#header.buffer);
    const short = this.#header[1]! & ~MASKED;
    if (short === 126) return view.getUint16(2);
    return short === 127 ? Number(view.getBigUint64(2)) : short;
  }
}
