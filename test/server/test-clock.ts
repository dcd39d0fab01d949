/** A clock that stands still until a test moves it. No test itself. */
import type { Clock } from '../../src/server/clock.ts';

export class TestClock implements Clock {
  time = 0;
  readonly #timers = new Set<{ at: number; action: () => void }>();

  now(): number {
    return this.time;
  }

  after(ms: number, action: () => void): () => void {
    const timer = { at: this.time + ms, action };
    this.#timers.add(timer);
    return () => this.#timers.delete(timer);
  }

  /** Timers go off in order, each at its own time, those that are set meanwhile too. */
  advance(ms: number): void {
    const end = this.time + ms;
    for (;;) {
      const [next] = [...this.#timers].sort((a, b) => a.at - b.at);
      if (next === undefined || next.at > end) break;
      this.#timers.delete(next);
      this.time = Math.max(this.time, next.at);
      next.action();
    }
    this.time = end;
  }
}
