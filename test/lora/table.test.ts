/** The table of low-rank blocks of a batch, read back as `shaders/gemm/lora_blocks.wgsl` reads it. No GPU. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { PlacedAdapter } from '../../src/lora/pool.ts';
import { loraTable, type StackEntry } from '../../src/lora/table.ts';

const SEED = 0x7ab1e;
const SLOTS = 5;
/** Rows per image by slot; slot 4 does not run. */
const ROWS: ReadonlyMap<number, number> = new Map([
  [0, 64],
  [1, 16],
  [2, 1],
  [3, 77],
]);

/** An adapter with this many blocks per slot; offsets are its own, so that a mix-up shows. */
function adapter(start: number, blocks: ReadonlyMap<number, number>, scale = 0.5): PlacedAdapter {
  const layers = [...blocks].map(
    ([slot, count]) =>
      [
        slot,
        {
          scale,
          blocks: Array.from({ length: count }, (_, b) => ({
            down: start + slot * 100 + b * 2,
            up: start + slot * 100 + b * 2 + 1,
          })),
        },
      ] as const,
  );
  return { layers: new Map(layers), sizeBytes: 0 };
}

interface Block {
  readonly down: number;
  readonly up: number;
  readonly scale: number;
  /** Which [m][8] part of T is the block's. */
  readonly t: number;
}

/** The blocks of one image at one slot. */
function blocksOf(words: Uint32Array, slot: number, image: number, images: number): readonly Block[] {
  const floats = new Float32Array(words.buffer);
  const head = (slot * images + image) * 4;
  const [first = 0, count = 0] = words.subarray(head, head + 2);
  return Array.from({ length: count }, (_, i) => {
    const at = (first + i) * 4;
    return { down: words[at]!, up: words[at + 1]!, scale: floats[at + 2]!, t: words[at + 3]! };
  });
}

const one = adapter(
  1000,
  new Map([
    [0, 1],
    [3, 2],
  ]),
);
const two = adapter(
  2000,
  new Map([
    [0, 3],
    [4, 1],
  ]),
  2,
);

describe('the table of a batch', () => {
  test('lists the blocks of each image in the order of its stack, with strength times scale', () => {
    const stacks: StackEntry[][] = [
      [
        { adapter: one, strength: 0.5 },
        { adapter: two, strength: -1 },
      ],
      [],
      [{ adapter: two, strength: 3 }],
    ];
    const table = loraTable(stacks, SLOTS, ROWS)!;
    const strip = (slot: number, image: number) =>
      blocksOf(table.words, slot, image, 3).map(({ down, up, scale }) => [down, up, scale]);
    expect(strip(0, 0)).toEqual([
      [1000, 1001, 0.25],
      [2000, 2001, -2],
      [2002, 2003, -2],
      [2004, 2005, -2],
    ]);
    expect(strip(0, 1)).toEqual([]);
    expect(strip(0, 2)).toEqual([
      [2000, 2001, 6],
      [2002, 2003, 6],
      [2004, 2005, 6],
    ]);
    expect(strip(3, 0)).toEqual([
      [1300, 1301, 0.25],
      [1302, 1303, 0.25],
    ]);
    expect(strip(1, 0)).toEqual([]);
    expect(table.blocks).toEqual(
      new Map([
        [0, 4],
        [3, 2],
      ]),
    );
    // Slot 0: seven blocks of 64 rows; slot 3: two of 77.
    expect(table.scratchBytes).toBe(7 * 64 * 8 * 4);
  });

  test('is left out where nothing is to be applied', () => {
    expect(loraTable([[], []], SLOTS, ROWS)).toBeUndefined();
    expect(loraTable([[{ adapter: one, strength: 0 }], []], SLOTS, ROWS)).toBeUndefined();
    expect(
      loraTable([[{ adapter: adapter(0, new Map([[4, 2]])), strength: 1 }]], SLOTS, ROWS),
    ).toBeUndefined();
  });

  test('takes strength 0 as no adapter, beside others too', () => {
    const with0 = loraTable(
      [
        [
          { adapter: two, strength: 0 },
          { adapter: one, strength: 1 },
        ],
      ],
      SLOTS,
      ROWS,
    );
    expect(with0).toEqual(loraTable([[{ adapter: one, strength: 1 }]], SLOTS, ROWS));
  });

  test('holds every block once and gives no two blocks of a slot the same part of T, whatever the stacks', () => {
    const blockMap = fc
      .dictionary(fc.constantFrom('0', '1', '2', '3', '4'), fc.integer({ min: 1, max: 4 }))
      .map((blocks) => new Map(Object.entries(blocks).map(([slot, count]) => [Number(slot), count])));
    const adapters = fc
      .array(blockMap, { minLength: 1, maxLength: 4 })
      .map((all) => all.map((blocks, i) => adapter(1000 * (i + 1), blocks)));
    const stacks = adapters.chain((all) =>
      fc.array(
        fc.array(fc.record({ adapter: fc.constantFrom(...all), strength: fc.constantFrom(0, -1, 0.5, 2) }), {
          maxLength: 4,
        }),
        { minLength: 1, maxLength: 5 },
      ),
    );
    fc.assert(
      fc.property(stacks, (given) => {
        const table = loraTable(given, SLOTS, ROWS);
        let most = 0;
        let all = 0;
        for (let slot = 0; slot < SLOTS; slot++) {
          const parts: number[] = [];
          let longest = 0;
          given.forEach((stack, image) => {
            const expected = ROWS.has(slot)
              ? stack
                  .filter(({ strength }) => strength !== 0)
                  .flatMap(({ adapter: { layers }, strength }) => {
                    const layer = layers.get(slot);
                    return (layer?.blocks ?? []).map((b) => ({ ...b, scale: strength * layer!.scale }));
                  })
              : [];
            const found = table ? blocksOf(table.words, slot, image, given.length) : [];
            expect(found.map(({ down, up, scale }) => ({ down, up, scale }))).toEqual(expected);
            parts.push(...found.map(({ t }) => t));
            longest = Math.max(longest, found.length);
          });
          // Parts of T are dense from 0, in the order of the images.
          expect(parts).toEqual(parts.map((_, i) => i));
          expect(table?.blocks.get(slot) ?? 0).toBe(longest);
          most = Math.max(most, parts.length * (ROWS.get(slot) ?? 0) * 8 * 4);
          all += parts.length;
        }
        expect(table?.scratchBytes ?? 0).toBe(most);
        expect(table?.words.length ?? 0).toBe(all === 0 ? 0 : (SLOTS * given.length + all) * 4);
      }),
      { seed: SEED, numRuns: 300 },
    );
  });
});
