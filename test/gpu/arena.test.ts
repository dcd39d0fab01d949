/** Placement in the arena, as a property of random lifetimes, and growth of its buffer on the null backend. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Arena, type Lifetime, place } from '../../src/gpu/arena.ts';
import { Device } from '../../src/gpu/device.ts';

const SEED = Number(process.env.UNETD_SEED ?? 20261124);

const lifetime: fc.Arbitrary<Lifetime> = fc
  .record({ sizeBytes: fc.integer({ min: 1, max: 5000 }), first: fc.nat(40), length: fc.nat(12) })
  .map(({ sizeBytes, first, length }) => ({ sizeBytes, first, last: first + length }));

const alignUp = (size: number): number => Math.ceil(size / 256) * 256;

describe('place', () => {
  test('never overlaps two tensors in both time and space, and needs at least the lower bound', () => {
    let ratios = 0;
    let runs = 0;
    fc.assert(
      fc.property(fc.array(lifetime, { minLength: 1, maxLength: 40 }), (lifetimes) => {
        const { offsets, totalBytes, lowerBoundBytes } = place(lifetimes, 256);
        expect(totalBytes).toBeGreaterThanOrEqual(lowerBoundBytes);
        lifetimes.forEach((a, i) => {
          expect(offsets[i]! % 256).toBe(0);
          expect(offsets[i]! + a.sizeBytes).toBeLessThanOrEqual(totalBytes);
          lifetimes.slice(0, i).forEach((b, j) => {
            if (a.last < b.first || b.last < a.first) return;
            const apart =
              offsets[i]! + alignUp(a.sizeBytes) <= offsets[j]! ||
              offsets[j]! + alignUp(b.sizeBytes) <= offsets[i]!;
            expect(apart, `${JSON.stringify(a)} and ${JSON.stringify(b)}`).toBe(true);
          });
        });
        ratios += totalBytes / lowerBoundBytes;
        runs += 1;
      }),
      { seed: SEED, numRuns: 500 },
    );
    const mean = ratios / runs;
    console.log(`[null] arena: ${mean.toFixed(3)} times the lower bound on average, seed ${SEED}`);
    expect(mean).toBeLessThan(1.15);
  });

  test('gives a tensor the room of one that is dead', () => {
    const placed = place(
      [
        { sizeBytes: 1000, first: 0, last: 1 },
        { sizeBytes: 1000, first: 1, last: 2 },
        { sizeBytes: 1000, first: 2, last: 3 },
      ],
      256,
    );
    expect(placed.totalBytes).toBe(2048);
    expect(placed.offsets[0]).toBe(placed.offsets[2]);
  });

  test('of nothing needs nothing', () => {
    expect(place([], 256)).toEqual({ offsets: [], totalBytes: 0, lowerBoundBytes: 0 });
  });
});

describe('null rung: an arena', () => {
  test('grows on demand, never shrinks, and makes bind groups stale only when it grows', async () => {
    const device = await Device.open({ backend: 'null' });
    const arena = new Arena(device, 'arena');
    expect(() => arena.buffer).toThrow(/before it has a size/);
    await arena.ensure(1000);
    const { buffer } = arena;
    const { generation } = device;
    await arena.ensure(500);
    expect(arena.buffer).toBe(buffer);
    expect(device.generation).toBe(generation);
    await arena.ensure(5000);
    expect(arena.sizeBytes).toBeGreaterThanOrEqual(5000);
    expect(device.generation).toBeGreaterThan(generation);
    arena.close();
    device.close();
  });

  test('refuses more than a buffer may hold, with both numbers', async () => {
    const device = await Device.open({ backend: 'null' });
    const needed = device.capabilities.maxBufferBytes * 2;
    await expect(new Arena(device, 'arena').ensure(needed)).rejects.toMatchObject({
      code: 'ERR_OUT_OF_MEMORY',
      details: { limit: device.capabilities.maxBufferBytes },
    });
    device.close();
  });
});
