/** Memory for requests: what a connection announces, what it waits for and what it gives back, without sockets. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Arrivals } from '../../src/server/arrivals.ts';
import { FrameMeter, type MessagePart } from '../../src/server/frame-meter.ts';
import { Intake } from '../../src/server/intake.ts';

interface Frame {
  readonly opcode: number;
  readonly isLast: boolean;
  readonly length: number;
  readonly masked: boolean;
}

/** The bytes of a frame as RFC 6455 lays them out. */
function frameBytes({ opcode, isLast, length, masked }: Frame): Buffer {
  const mask = masked ? 0x80 : 0;
  const head = [(isLast ? 0x80 : 0) | opcode];
  if (length < 126) head.push(mask | length);
  else if (length < 65_536) head.push(mask | 126, length >> 8, length & 255);
  else head.push(mask | 127, 0, 0, 0, 0, ...[24, 16, 8, 0].map((shift) => (length >>> shift) & 255));
  // A payload of bytes that look like headers.
  return Buffer.concat([Buffer.from(head), Buffer.alloc(masked ? 4 : 0, 0x81), Buffer.alloc(length, 0x82)]);
}

const frames = fc.array(
  fc.record({
    opcode: fc.constantFrom(0, 1, 2, 8, 9, 10),
    isLast: fc.boolean(),
    length: fc.oneof(fc.integer({ min: 0, max: 130 }), fc.integer({ min: 65_530, max: 65_540 })),
    masked: fc.boolean(),
  }),
  { maxLength: 6 },
);

describe('the meter of frames', () => {
  it('finds every data frame, however the bytes are cut', () => {
    fc.assert(
      fc.property(frames, fc.array(fc.integer({ min: 1, max: 70_000 }), { minLength: 1 }), (sent, cuts) => {
        const bytes = Buffer.concat(sent.map(frameBytes));
        const meter = new FrameMeter();
        const found: MessagePart[] = [];
        for (let at = 0, turn = 0; at < bytes.byteLength; turn += 1) {
          const end = at + cuts[turn % cuts.length]!;
          found.push(...meter.read(bytes.subarray(at, end)));
          at = end;
        }
        const data = sent.filter(({ opcode }) => opcode < 8);
        expect(found).toEqual(data.map(({ length, isLast }) => ({ bytes: length, isLast })));
        expect(meter.isInside).toBe(data.length > 0 && !data.at(-1)!.isLast);
      }),
    );
  });

  it('tells the size before the payload has come', () => {
    const meter = new FrameMeter();
    const head = frameBytes({ opcode: 2, isLast: true, length: 70_000, masked: true }).subarray(0, 14);
    expect(meter.read(head)).toEqual([{ bytes: 70_000, isLast: true }]);
    expect(meter.isInside).toBe(true);
  });
});

describe('the memory for requests', () => {
  it('is never overdrawn, goes to all in the end, and comes back whole', () => {
    const events = fc.array(
      fc.record({
        owner: fc.constantFrom('a', 'b', 'c', 'd'),
        bytes: fc.integer({ min: 1, max: 40 }),
        what: fc.constantFrom('take', 'take', 'give', 'end'),
      }),
      { maxLength: 80 },
    );
    fc.assert(
      fc.property(events, (steps) => {
        const intake = new Intake(100, 40);
        const held: { owner: string; bytes: number }[] = [];
        let waiting = 0;
        const sum = (owner?: string): number =>
          held
            .filter((each) => owner === undefined || each.owner === owner)
            .reduce((total, { bytes }) => total + bytes, 0);
        const drop = (at: number): void => {
          const [{ owner, bytes }] = held.splice(at, 1) as [{ owner: string; bytes: number }];
          intake.give(owner, bytes);
        };
        const ended = new Set<string>();
        for (const { owner, bytes, what } of steps) {
          if (ended.has(owner)) continue;
          if (what === 'take') {
            waiting += 1;
            const granted = (): void => {
              waiting -= 1;
              held.push({ owner, bytes });
            };
            if (intake.take(owner, bytes, granted)) granted();
          } else if (what === 'give' && held.length > 0) drop(0);
          else if (what === 'end') {
            ended.add(owner);
            // What it waited for is granted to nobody.
            const before = waiting;
            for (let at = held.length - 1; at >= 0; at -= 1)
              if (held[at]!.owner === owner) held.splice(at, 1);
            intake.forget(owner);
            expect(waiting).toBeLessThanOrEqual(before);
          }
          expect(intake.usedBytes).toBe(sum());
          expect(sum()).toBeLessThanOrEqual(100);
          for (const each of ['a', 'b', 'c', 'd']) expect(sum(each)).toBeLessThanOrEqual(40);
        }
        while (held.length > 0) drop(0);
        expect(intake.usedBytes).toBe(0);
        expect(intake.isShort).toBe(false);
      }),
      { numRuns: 500 },
    );
  });

  it('is asked for when a large message is announced, and given back once', () => {
    const intake = new Intake(300_000, 200_000);
    const grants: string[] = [];
    const open = (owner: string): Arrivals => new Arrivals(owner, intake, () => grants.push(owner));
    const [a, b] = [open('a'), open('b')];
    const large = frameBytes({ opcode: 2, isLast: true, length: 180_000, masked: true });
    a.read(large, 1);
    expect(a.arrivingSince).toBeNull();
    b.read(large.subarray(0, 20), 5);
    expect([intake.usedBytes, b.mustWait, b.arrivingSince]).toEqual([180_000, true, null]);
    const done = a.take();
    done();
    done();
    expect([intake.usedBytes, b.mustWait, b.arrivingSince, grants]).toEqual([180_000, false, 5, ['b']]);
    b.close();
    b.take()();
    expect(intake.usedBytes).toBe(0);
  });

  it('is not asked for by small messages, so that a cancel always gets through', () => {
    const intake = new Intake(1, 1);
    const arrivals = new Arrivals('a', intake, () => {});
    for (let n = 0; n < 50; n += 1)
      arrivals.read(frameBytes({ opcode: 1, isLast: true, length: 60_000, masked: true }), 0);
    expect(arrivals.mustWait).toBe(false);
    // In many small pieces it is large all the same.
    for (let n = 0; n < 50; n += 1)
      arrivals.read(frameBytes({ opcode: n === 0 ? 1 : 0, isLast: false, length: 60_000, masked: true }), 0);
    expect(arrivals.mustWait).toBe(true);
  });
});
