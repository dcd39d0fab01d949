/**
 * How many images a batch may hold, by model and shape: fewer for a while after memory ran out, then step by step as many as
 * before. Pure logic over an injected clock; runs nothing.
 */
import type { Clock } from './clock.ts';

interface Lowered {
  readonly cap: number;
  /** When twice as many are tried. */
  readonly until: number;
  readonly pauseMs: number;
}

/** How long a lowered size stays; each time that memory runs out again soon after, twice as long as the time before. */
const FIRST_PAUSE_MS = 60_000;
const MAX_PAUSE_MS = 3_600_000;
/** Pauses after the end of a pause within which a failure counts as the same one. */
const SOON = 4;
/** Most keys remembered. */
const MAX_KEYS = 1024;

export class BatchCaps {
  readonly most: number;
  readonly #clock: Clock;
  readonly #lowered = new Map<string, Lowered>();

  constructor(most: number, clock: Clock) {
    this.most = most;
    this.#clock = clock;
  }

  /** Most images of a batch now. Once its pause is over a lowered size doubles, and again after each further pause. */
  of(key: string): number {
    const lowered = this.#lowered.get(key);
    if (lowered === undefined) return this.most;
    const over = this.#clock.now() - lowered.until;
    if (over < 0) return lowered.cap;
    return Math.min(this.most, lowered.cap * 2 ** (1 + Math.min(30, Math.floor(over / lowered.pauseMs))));
  }

  /** Says that so many images did not fit: from now on at most half as many are tried. */
  lower(key: string, images: number): void {
    const before = this.#lowered.get(key);
    const cap = Math.min(this.of(key), Math.max(1, Math.floor(images / 2)));
    const now = this.#clock.now();
    let pauseMs = FIRST_PAUSE_MS;
    // The pieces of one batch fail one after another: only a size that was tried again has failed again.
    if (before !== undefined && now < before.until) pauseMs = before.pauseMs;
    else if (before !== undefined && now < before.until + SOON * before.pauseMs)
      pauseMs = Math.min(MAX_PAUSE_MS, before.pauseMs * 2);
    this.#lowered.delete(key);
    for (const oldest of this.#lowered.keys()) {
      if (this.#lowered.size < MAX_KEYS) break;
      this.#lowered.delete(oldest);
    }
    this.#lowered.set(key, { cap, until: now + pauseMs, pauseMs });
  }
}
