/**
 * What running requests of different connections together gains over one at a time, with the real engine, and that different LoRAs do
 * not prevent it. Both servers run side by side and are asked in turns, so that other load on the machine is shared.
 */
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { Client } from '../protocol/client.ts';
import { MODEL, type Server, serve } from '../protocol/server.ts';
import { f32, type Tensors } from '../protocol/tensors.ts';
import { amount, median, report } from './scale.ts';

const CONNECTIONS = 8;
const ROUNDS = amount(15, 5);
const LORAS = ['ink', 'neon', 'terracotta'];

const wave = (count: number, seed: number): number[] =>
  Array.from({ length: count }, (_, i) => Math.sin((i + seed * 1000) * 12.9898) * 1.5);
const tensorsOf = (seed: number): Tensors =>
  new Map([
    ['x', f32([1, 3, 16, 16], wave(768, seed))],
    ['timesteps', f32([1], [37 * seed])],
    ['context', f32([1, 4, 64], wave(256, seed + 50))],
  ]);

interface Side {
  readonly server: Server;
  readonly clients: readonly Client[];
}

const sides: Side[] = [];

beforeAll(async () => {
  for (const most of ['1', '8']) {
    const server = await serve('--dtype', 'f32', '--log-level', 'warn', '--max-batch', most);
    sides.push({
      server,
      clients: await Promise.all(Array.from({ length: CONNECTIONS }, () => server.open())),
    });
  }
});
afterAll(() => Promise.all(sides.map(({ server }) => server.stop())));

/** Milliseconds of two requests from each connection at once, and the requests that shared a batch on average. */
async function round({ clients }: Side, isMixed: boolean): Promise<{ ms: number; together: number }> {
  const since = performance.now();
  const answers = await Promise.all(
    [...clients, ...clients].map((client, n) => {
      const lora = `${LORAS[isMixed ? n % 3 : 0]}.safetensors`;
      const loras = [{ lora, strength: isMixed ? 1 - n / 10 : 1 }];
      return client.send('forward', { model: MODEL, loras }, tensorsOf(n));
    }),
  );
  const ms = performance.now() - since;
  for (const { error } of answers) expect(error).toBeUndefined();
  const together = answers.map(({ timing }) => timing!.batchedRequests);
  return { ms, together: together.reduce((sum, each) => sum + each, 0) / together.length };
}

test('batches raise the throughput over one request at a time, with different LoRAs too', async () => {
  const [serial, batched] = sides as [Side, Side];
  const shared: number[] = [];
  const all = async (count: number): Promise<number[][]> => {
    const rows: number[][] = [[], [], [], []];
    for (let n = 0; n < count; n += 1) {
      for (const [at, [side, isMixed]] of (
        [
          [serial, false],
          [batched, false],
          [serial, true],
          [batched, true],
        ] as const
      ).entries()) {
        const { ms, together } = await round(side, isMixed);
        rows[at]!.push(ms);
        if (side === batched) shared.push(together);
        else expect(together).toBe(1);
      }
    }
    return rows;
  };
  await all(2);
  const [one, many, oneMixed, manyMixed] = (await all(ROUNDS)).map(median) as [
    number,
    number,
    number,
    number,
  ];
  const perSecond = (ms: number): string => ((2 * CONNECTIONS * 1000) / ms).toFixed(0);
  report(`batching: ${median(shared).toFixed(1)} requests shared a batch`);
  report(
    `batching, one LoRA: ${perSecond(one)} forwards/s one at a time, ${perSecond(many)} in batches (${(one / many).toFixed(2)}x)`,
  );
  report(
    `batching, three LoRAs mixed: ${perSecond(oneMixed)} and ${perSecond(manyMixed)} (${(oneMixed / manyMixed).toFixed(2)}x)`,
  );
  expect(median(shared)).toBeGreaterThan(3);
  expect(one / many).toBeGreaterThan(1);
  expect(oneMixed / manyMixed).toBeGreaterThan(1);
});
