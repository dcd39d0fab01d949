/** Batch sizes after memory ran out: how far they fall, and when and how they recover. On a clock that the test moves. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { BatchCaps } from '../../src/server/caps.ts';
import { TestClock } from './test-clock.ts';

const MINUTE = 60_000;

describe('batch sizes', () => {
  it('fall to half of what did not fit, for that shape only, and come back step by step', () => {
    const clock = new TestClock();
    const caps = new BatchCaps(8, clock);
    caps.lower('a', 8);
    caps.lower('a', 4);
    expect([caps.of('a'), caps.of('b')]).toEqual([2, 8]);
    const seen: number[] = [];
    for (let minute = 1; minute <= 3; minute += 1) {
      clock.advance(MINUTE);
      seen.push(caps.of('a'));
    }
    expect(seen).toEqual([4, 8, 8]);
  });

  it('are tried more and more rarely while they keep failing', () => {
    const clock = new TestClock();
    const caps = new BatchCaps(8, clock);
    let trials = 0;
    for (let minute = 0; minute < 600; minute += 1) {
      if (caps.of('a') > 4) {
        trials += 1;
        caps.lower('a', 8);
      }
      clock.advance(MINUTE);
    }
    // After 0, 1, 3, 7, 15, 31, 63 minutes, and then every hour.
    expect(trials).toBe(7 + 8);
  });

  it('stay between one and the most, whatever happens', () => {
    const events = fc.array(fc.record({ ms: fc.nat(10 * MINUTE), fails: fc.boolean() }), { maxLength: 60 });
    fc.assert(
      fc.property(events, fc.integer({ min: 1, max: 64 }), (steps, most) => {
        const clock = new TestClock();
        const caps = new BatchCaps(most, clock);
        for (const { ms, fails } of steps) {
          clock.advance(ms);
          const before = caps.of('k');
          expect(before).toBeGreaterThanOrEqual(1);
          expect(before).toBeLessThanOrEqual(most);
          if (!fails) continue;
          caps.lower('k', before);
          expect(caps.of('k')).toBe(Math.max(1, Math.floor(before / 2)));
        }
        clock.advance(100 * 60 * MINUTE);
        expect(caps.of('k')).toBe(most);
      }),
    );
  });
});
