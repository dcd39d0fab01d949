/**
 * What one connection is sending: reserves memory for each of its messages as frames announce them, and knows whether it must wait
 * for that. Joins `frame-meter.ts` and `intake.ts`; knows no sockets.
 */
import { FrameMeter } from './frame-meter.ts';
import type { Intake } from './intake.ts';

/** Messages up to this size are not counted: waiting for them would hold up what frees memory, such as a cancel. */
const FREE_BYTES = 65_536;

export class Arrivals {
  readonly #owner: string;
  readonly #intake: Intake;
  readonly #meter = new FrameMeter();
  readonly #onGranted: () => void;
  /** Bytes reserved for each message that has been announced whole and not been taken yet. */
  readonly #whole: number[] = [];
  /** Bytes announced for the current message, and those of them reserved. */
  #announced = 0;
  #reserved = 0;
  #asked = 0;
  #begunAt = 0;
  #closed = false;

  /** `onGranted` is called when memory has come that was waited for. */
  constructor(owner: string, intake: Intake, onGranted: () => void) {
    this.#owner = owner;
    this.#intake = intake;
    this.#onGranted = onGranted;
  }

  /** Whether nothing more should be read for now. */
  get mustWait(): boolean {
    return this.#asked > 0;
  }

  /** When the message began that holds memory and is not whole yet; null where there is none. */
  get arrivingSince(): number | null {
    return this.#meter.isInside && this.#begunAt > 0 && !this.mustWait ? this.#begunAt : null;
  }

  /** Takes the bytes that have come, before or after whoever reads the messages in them. */
  read(chunk: Uint8Array, now: number): void {
    for (const { bytes, isLast } of this.#meter.read(chunk)) {
      this.#announced += bytes;
      const missing = this.#announced - this.#reserved;
      if (this.#announced > FREE_BYTES) {
        if (this.#reserved === 0) this.#begunAt = now;
        this.#reserved += missing;
        if (!this.#intake.take(this.#owner, missing, () => this.#granted())) this.#asked += 1;
      } else this.#begunAt = 0;
      if (!isLast) continue;
      this.#whole.push(this.#reserved);
      this.#announced = 0;
      this.#reserved = 0;
    }
  }

  /** To be called with each whole message; the result gives its memory back, once. */
  take(): () => void {
    let bytes = this.#whole.shift() ?? 0;
    return () => {
      if (bytes > 0 && !this.#closed) this.#intake.give(this.#owner, bytes);
      bytes = 0;
    };
  }

  /** The connection has ended. */
  close(): void {
    this.#closed = true;
    this.#intake.forget(this.#owner);
  }

  #granted(): void {
    this.#asked -= 1;
    if (this.#asked === 0) this.#onGranted();
  }
}
