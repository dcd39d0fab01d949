/** The pool of adapters: its allocator (no GPU), and what lies in its pages after growth, trimming and cycling (rung `software`). */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/gpu/device.ts';
import { toF32 } from '../../src/half.ts';
import type { Adapter } from '../../src/lora/adapter.ts';
import { blockCount, blockSize } from '../../src/lora/blocks.ts';
import type { PageOptions } from '../../src/lora/pages.ts';
import { AdapterPool, type PlacedAdapter } from '../../src/lora/pool.ts';
import { Stretches } from '../../src/lora/stretches.ts';
import type { Layer } from '../../src/unet/config.ts';

const SEED = 0x9001;

describe('the allocator of a page', () => {
  test('never lets two live regions overlap, and has one stretch again once all are given back', () => {
    const step = fc.oneof(
      fc.record({ kind: fc.constant('take' as const), quads: fc.integer({ min: 1, max: 40 }) }),
      fc.record({ kind: fc.constant('give' as const), which: fc.nat() }),
      fc.record({ kind: fc.constant('grow' as const), quads: fc.integer({ min: 0, max: 60 }) }),
      fc.record({ kind: fc.constant('trim' as const) }),
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 120 }), (steps) => {
        const page = new Stretches();
        const live: { offset: number; quads: number }[] = [];
        for (const action of steps) {
          if (action.kind === 'take') {
            const offset = page.take(action.quads);
            const longest = Math.max(0, ...page.free.map(({ quads }) => quads));
            if (offset === undefined) expect(longest).toBeLessThan(action.quads);
            else live.push({ offset, quads: action.quads });
          } else if (action.kind === 'give' && live.length > 0)
            page.give(live.splice(action.which % live.length, 1)[0]!);
          else if (action.kind === 'grow') page.resize(page.size + action.quads);
          else if (action.kind === 'trim') page.resize(page.end);
          // Live and free regions tile the page without gaps, and no two free ones touch.
          const free = page.free.map((stretch) => ({ ...stretch, isFree: true }));
          const tiles = [...free, ...live.map((region) => ({ ...region, isFree: false }))];
          tiles.sort((a, b) => a.offset - b.offset);
          let at = 0;
          tiles.forEach(({ offset, quads, isFree }, i) => {
            expect(offset).toBe(at);
            expect(isFree && tiles[i + 1]?.isFree).not.toBe(true);
            at += quads;
          });
          expect(at).toBe(page.size);
        }
        for (const region of live) page.give(region);
        expect(page.free).toEqual(page.size > 0 ? [{ offset: 0, quads: page.size }] : []);
        expect(page.end).toBe(0);
      }),
      { seed: SEED, numRuns: 300 },
    );
  });

  test('does not shrink under what is in use', () => {
    const page = new Stretches();
    page.resize(10);
    page.take(6);
    expect(page.end).toBe(6);
    expect(() => page.resize(5)).toThrow('6 quads are in use');
  });
});

const LAYERS: readonly Layer[] = [
  { id: 'a', kind: 'linear', inFeatures: 40, outFeatures: 64, kernel: 1 },
  { id: 'b', kind: 'conv', inFeatures: 24, outFeatures: 33, kernel: 3 },
  { id: 'c', kind: 'linear', inFeatures: 7, outFeatures: 5, kernel: 1 },
  { id: 'd', kind: 'linear', inFeatures: 320, outFeatures: 1280, kernel: 1 },
];

/** An adapter whose values name it, its layer and their place, exactly in f16. */
function adapterOf(seed: number, ranks: Readonly<Record<string, number>>): Adapter {
  const value = (i: number): number => (((i + 1) * (2 * seed + 7919)) % 1021) / 512;
  const layers = Object.entries(ranks).map(([id, rank]) => {
    const { inFeatures, outFeatures, kernel } = LAYERS.find((layer) => layer.id === id)!;
    return {
      layer: id,
      rank,
      scale: 1 / (seed + 1),
      down: Float32Array.from({ length: rank * kernel ** 2 * inFeatures }, (_, i) => value(i)),
      up: Float32Array.from({ length: rank * outFeatures }, (_, i) => -value(i)),
    };
  });
  const nothing = { patches: [], matched: [], unmatched: [], textEncoder: [] };
  return { digest: '', format: '', rank: 0, layers, sizeBytes: 0, ...nothing };
}

describe.each(['f32', 'f16'] as const)('the pool in %s storage (software)', (storage) => {
  let device: Device;
  beforeAll(async () => {
    device = await Device.open();
  });
  afterAll(() => device.close());

  const poolOf = (options: PageOptions) => new AdapterPool(device, storage, LAYERS, options);

  /** Reads every matrix of an adapter back out of its blocks. */
  async function check(pool: AdapterPool, adapter: Adapter, placed: PlacedAdapter): Promise<void> {
    expect(placed.layers.size).toBe(adapter.layers.length);
    for (const { layer: id, rank, scale, down, up } of adapter.layers) {
      const slot = LAYERS.findIndex((layer) => layer.id === id);
      const { inFeatures, outFeatures, kernel } = LAYERS[slot]!;
      const found = placed.layers.get(slot)!;
      expect(found.scale).toBe(scale);
      expect(found.blocks.length).toBe(blockCount(rank));
      const buffer = pool.operand(slot).current();
      const page = toF32(storage === 'f16' ? 'F16' : 'F32', await device.read(buffer, 0, buffer.size));
      const k = kernel ** 2 * inFeatures;
      const stored = Math.ceil(inFeatures / 8) * 8;
      const wrong: string[] = [];
      for (let r = 0; r < rank; r++) {
        const block = found.blocks[Math.floor(r / 8)]!;
        for (let i = 0; i < k; i++) {
          const row = Math.floor(i / inFeatures) * stored + (i % inFeatures);
          if (page[block.down * 4 + row * 8 + (r % 8)] !== down[r * k + i]) wrong.push(`down ${r} ${i}`);
        }
        for (let n = 0; n < outFeatures; n++) {
          const at = block.up * 4 + Math.floor(n / 32) * 8 * 32 + (r % 8) * 32 + (n % 32);
          if (page[at] !== up[n * rank + r]) wrong.push(`up ${n} ${r}`);
        }
      }
      expect(wrong, `layer ${id}`).toEqual([]);
    }
  }

  test.each([1, 3, 4])('keeps what lies in %i pages while they grow', async (pages) => {
    const pool = poolOf({ pages });
    const held: (readonly [Adapter, PlacedAdapter])[] = [];
    for (let i = 0; i < 8; i++) {
      const adapter = adapterOf(i, i % 2 ? { a: 3, b: 8, c: 1, d: 17 } : { b: 9, d: 4 });
      held.push([adapter, (await pool.add(adapter))!]);
    }
    const { generation } = device;
    expect(generation).toBeGreaterThan(0);
    for (const [adapter, placed] of held) {
      await check(pool, adapter, placed);
      expect(placed.sizeBytes).toBe(pool.bytesOf(adapter));
    }
    // Every second one goes; new ones take their places without growth, and the others stay as they are.
    const { sizeBytes } = pool;
    for (const [, placed] of held.filter((_, i) => i % 2)) pool.remove(placed);
    const again = adapterOf(20, { a: 3, b: 8, c: 1, d: 17 });
    const placedAgain = (await pool.add(again))!;
    expect(pool.sizeBytes).toBe(sizeBytes);
    await check(pool, again, placedAgain);
    for (const [adapter, placed] of held.filter((_, i) => i % 2 === 0)) await check(pool, adapter, placed);
    pool.close();
  });

  test('stays under its limit, takes as much as fits, and moves room between pages', async () => {
    const wide = adapterOf(1, { d: 64 });
    const conv = adapterOf(2, { b: 64 });
    const limitBytes = poolOf({ pages: 1 }).bytesOf(wide) + 1024;
    const pool = poolOf({ pages: 4, limitBytes });
    const first = (await pool.add(wide))!;
    expect(await pool.add(conv)).toBeUndefined();
    expect(pool.sizeBytes).toBeLessThanOrEqual(limitBytes);
    await check(pool, wide, first);
    pool.remove(first);
    // The page of `d` is empty but large: it gives its room to that of `b`.
    await check(pool, conv, (await pool.add(conv))!);
    expect(pool.sizeBytes).toBeLessThanOrEqual(limitBytes);
    pool.close();
  });

  test('takes nothing where the budget has nothing, and leaves no region behind', async () => {
    let spare = Number.POSITIVE_INFINITY;
    const pool = poolOf({ pages: 4, spareBytes: () => spare });
    const small = adapterOf(3, { a: 8, c: 8 });
    const placed = (await pool.add(small))!;
    spare = 0;
    const { sizeBytes } = pool;
    expect(await pool.add(adapterOf(4, { a: 8, b: 8, d: 128 }))).toBeUndefined();
    expect(pool.sizeBytes).toBeLessThanOrEqual(sizeBytes);
    await check(pool, small, placed);
    pool.remove(placed);
    spare = Number.POSITIVE_INFINITY;
    await check(pool, small, (await pool.add(small))!);
    pool.close();
  });

  test('holds two adapters in room for two, whichever six come and go', async () => {
    const six = [
      { a: 4, b: 4, c: 4, d: 4 },
      { d: 32 },
      { a: 16, b: 16 },
      { a: 1, b: 1, c: 1, d: 1 },
      { b: 24, d: 8 },
      { c: 32, d: 24 },
    ].map((ranks, i) => adapterOf(30 + i, ranks));
    const largest = Math.max(...six.map((adapter) => poolOf({ pages: 1 }).bytesOf(adapter)));
    const pool = poolOf({ pages: 2, limitBytes: 2 * largest });
    let before: PlacedAdapter | undefined;
    for (let i = 0; i < 18; i++) {
      const adapter = six[(i * 5) % 6]!;
      const placed = (await pool.add(adapter))!;
      await check(pool, adapter, placed);
      if (before) pool.remove(before);
      before = placed;
      expect(pool.sizeBytes).toBeLessThanOrEqual(2 * largest);
    }
    pool.close();
  });

  test('has blocks as large as the kernels step through them', () => {
    for (const layer of LAYERS) {
      const { down, up } = blockSize(layer);
      expect(down * 4).toBe(layer.kernel ** 2 * Math.ceil(layer.inFeatures / 8) * 8 * 8);
      expect(up * 4).toBe(Math.ceil(layer.outFeatures / 32) * 32 * 8);
    }
  });
});
