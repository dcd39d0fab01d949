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

  advance(ms: number): void {
    this.time += ms;
    for (const timer of [...this.#timers]) {
      if (timer.at > this.time || !this.#timers.delete(timer)) continue;
      timer.action();
    }
  }
}
