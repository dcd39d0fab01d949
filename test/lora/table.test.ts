/** The table of low-rank blocks of a batch, read back as `shaders/gemm/lora_blocks.wgsl` reads it. No GPU. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { PlacedAdapter } from '../../src/lora/pool.ts';
import { loraTable, type StackEntry } from '../../src/lora/table.ts';
import type { LayerInput } from '../../src/unet/tensors.ts';

const SEED = 0x7ab1e;
const SLOTS = 5;
/** Slots 0 and 3 read one tensor; slot 4 does not run. */
const INPUTS: readonly LayerInput[] = [
  { slots: [0, 3], rows: 64 },
  { slots: [1], rows: 16 },
  { slots: [2], rows: 1 },
];

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
  return { digest: '', layers: new Map(layers), patches: new Map(), sizeBytes: 0 };
}

interface Block {
  readonly down: number;
  readonly up: number;
  readonly scale: number;
  /** Which [m][8] part of T is the block's. */
  readonly t: number;
}

/** The blocks of one image at one slot. */
const blocksOf = (words: Uint32Array, slot: number, image: number, images: number): readonly Block[] =>
  listOf(words, (slot * images + image) * 4);

/** The blocks of one image at all slots that read what this one reads first. */
const sharedOf = (words: Uint32Array, slot: number, image: number, images: number): readonly Block[] =>
  listOf(words, (slot * images + image) * 4 + 2);

function listOf(words: Uint32Array, head: number): readonly Block[] {
  const floats = new Float32Array(words.buffer);
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
    const table = loraTable(stacks, SLOTS, INPUTS)!;
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
    // Slots 0 and 3 share one list: seven blocks and two, of 64 rows.
    expect(table.scratchBytes).toBe(9 * 64 * 8 * 4);
    expect(sharedOf(table.words, 0, 0, 3).map(({ down, t }) => [down, t])).toEqual([
      [1000, 0],
      [2000, 1],
      [2002, 2],
      [2004, 3],
      [1300, 4],
      [1302, 5],
    ]);
    expect(sharedOf(table.words, 0, 1, 3)).toEqual([]);
    expect(sharedOf(table.words, 0, 2, 3).map(({ t }) => t)).toEqual([6, 7, 8]);
  });

  test('is left out where nothing is to be applied', () => {
    expect(loraTable([[], []], SLOTS, INPUTS)).toBeUndefined();
    expect(loraTable([[{ adapter: one, strength: 0 }], []], SLOTS, INPUTS)).toBeUndefined();
    expect(
      loraTable([[{ adapter: adapter(0, new Map([[4, 2]])), strength: 1 }]], SLOTS, INPUTS),
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
      INPUTS,
    );
    expect(with0).toEqual(loraTable([[{ adapter: one, strength: 1 }]], SLOTS, INPUTS));
  });

  test('holds every block once and gives no two blocks of an input the same part of T, whatever the stacks', () => {
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
        const table = loraTable(given, SLOTS, INPUTS);
        let most = 0;
        let all = 0;
        for (let slot = 0; slot < SLOTS; slot++) {
          const runs = INPUTS.some(({ slots }) => slots.includes(slot));
          const lists = given.map((stack, image) => {
            const expected = stack
              .filter(({ strength }) => runs && strength !== 0)
              .flatMap(({ adapter: { layers }, strength }) => {
                const layer = layers.get(slot);
                return (layer?.blocks ?? []).map((b) => ({ ...b, scale: strength * layer!.scale }));
              });
            const found = table ? blocksOf(table.words, slot, image, given.length) : [];
            expect(found.map(({ down, up, scale }) => ({ down, up, scale }))).toEqual(expected);
            return found;
          });
          expect(table?.blocks.get(slot) ?? 0).toBe(Math.max(...lists.map(({ length }) => length)));
        }
        for (const { slots, rows } of INPUTS) {
          const shared = given.map((_, image) =>
            table ? sharedOf(table.words, slots[0]!, image, given.length) : [],
          );
          shared.forEach((list, image) => {
            const each = slots.flatMap((slot) =>
              table ? blocksOf(table.words, slot, image, given.length) : [],
            );
            expect(list).toEqual(each);
          });
          // Parts of T are dense from 0, in the order of the images.
          const parts = shared.flat().map(({ t }) => t);
          expect(parts).toEqual(parts.map((_, i) => i));
          most = Math.max(most, parts.length * rows * 8 * 4);
          all += parts.length;
        }
        expect(table?.scratchBytes ?? 0).toBe(most);
        expect(table?.words.length ?? 0).toBe(all === 0 ? 0 : (SLOTS * given.length + all) * 4);
      }),
      { seed: SEED, numRuns: 300 },
    );
  });
});
