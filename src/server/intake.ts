/**
 * Memory for requests of all connections together: a message asks for its bytes when its WebSocket frame is announced, before they
 * arrive, and gives them back when its answer has left. Counts bytes only; who pauses and who ends connections is `sockets.ts`.
 */

interface Waiter {
  readonly owner: string;
  readonly bytes: number;
  readonly granted: () => void;
}

export class Intake {
  readonly limitBytes: number;
  readonly #ownerBytes: number;
  readonly #held = new Map<string, number>();
  readonly #waiters: Waiter[] = [];
  #used = 0;

  /** Bytes for all, and for one connection. Either must have room for the largest message. */
  constructor(limitBytes: number, ownerBytes: number) {
    this.limitBytes = limitBytes;
    this.#ownerBytes = ownerBytes;
  }

  get usedBytes(): number {
    return this.#used;
  }

  /** Whether a connection waits for bytes that others hold. */
  get isShort(): boolean {
    return this.#waiters.some(({ owner, bytes }) => this.#fitsOwner(owner, bytes));
  }

  /** Takes the bytes now and returns true, or later, in order of asking, and calls `granted` then. */
  take(owner: string, bytes: number, granted: () => void): boolean {
    if (!this.isShort && this.#fitsOwner(owner, bytes) && this.#used + bytes <= this.limitBytes) {
      this.#hold(owner, bytes);
      return true;
    }
    this.#waiters.push({ owner, bytes, granted });
    return false;
  }

  give(owner: string, bytes: number): void {
    this.#hold(owner, -bytes);
    this.#grant();
  }

  /** Gives back all that a connection that has ended holds or waits for. */
  forget(owner: string): void {
    const others = this.#waiters.filter((waiter) => waiter.owner !== owner);
    this.#waiters.splice(0, this.#waiters.length, ...others);
    this.give(owner, this.#held.get(owner) ?? 0);
  }

  #hold(owner: string, bytes: number): void {
    const held = (this.#held.get(owner) ?? 0) + bytes;
    if (held > 0) this.#held.set(owner, held);
    else this.#held.delete(owner);
    this.#used += bytes;
  }

  #fitsOwner(owner: string, bytes: number): boolean {
    return (this.#held.get(owner) ?? 0) + bytes <= this.#ownerBytes;
  }

  /** A connection at its own limit holds up nobody; one that the others leave no room holds up those behind it. */
  #grant(): void {
    for (let at = 0; at < this.#waiters.length; ) {
      const { owner, bytes, granted } = this.#waiters[at]!;
      if (!this.#fitsOwner(owner, bytes)) at += 1;
      else if (this.#used + bytes > this.limitBytes) return;
      else {
        this.#waiters.splice(at, 1);
        this.#hold(owner, bytes);
        granted();
      }
    }
  }
}
