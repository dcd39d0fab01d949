/**
 * Many open requests from several connections with different LoRAs: batched, equal to single runs, failing alone.
 * It is not about speed, and not about what one request computes; see `forward.test.ts`.
 */
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Client, Fields, Message } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { errorOf, f32, readTensors, rows, type Tensor, type Tensors } from './tensors.ts';

const reference = readTensors(`${ASSETS}reference.safetensors`).tensors;
const noise = (count: number, seed: number): number[] =>
  Array.from({ length: count }, (_, i) => Math.sin((i + seed * 1000) * 12.9898) * 1.5);
/** One image of its own for every seed, all of one size. */
const inputsOf = (seed: number): Tensors =>
  new Map([
    ['x', f32([1, 3, 16, 16], noise(768, seed))],
    ['timesteps', f32([1], [100 * seed + 7])],
    ['context', f32([1, 4, 64], noise(256, seed + 50))],
  ]);
const use = (...loras: [string, number][]) => ({
  loras: loras.map(([lora, strength]) => ({ lora: `${lora}.safetensors`, strength })),
});
const STYLES: readonly Fields[] = [
  {},
  use(['ink', 1]),
  use(['neon', 0.8]),
  use(['terracotta', -0.5]),
  use(['ink', 0.7], ['neon', -0.3]),
  use(['terracotta', 2], ['ink', 0]),
];
/** Rounding depends on the batch; a LoRA of another row, or a row of another request, is far more. */
const SAME = 1e-4;
const connections: Client[] = [];
let server: Server;

beforeAll(async () => {
  server = await serve('--queue-limit', '24', '--dtype', 'f32');
});
afterAll(() => server?.stop());
beforeEach(async () => {
  connections.push(await server.open(), await server.open(), await server.open());
});
afterEach(async () => {
  for (const client of connections.splice(0)) expect(await client.finish()).toEqual([]);
});

const forward = (
  client: number,
  seed: number,
  fields: Fields = {},
  changes: Tensors = new Map(),
): Promise<Message> =>
  connections[client]!.send('forward', { model: MODEL, ...fields }, new Map([...inputsOf(seed), ...changes]));

async function out(answer: Message | Promise<Message>): Promise<Tensor> {
  const { error, tensors } = await answer;
  expect(error).toBeUndefined();
  return tensors!.get('out')!;
}

test('requests of several connections with different LoRAs come back batched and equal single runs', async () => {
  const singles: Tensor[] = [];
  for (const [seed, style] of STYLES.entries()) singles.push(await out(forward(0, seed, style)));
  for (const [i, a] of singles.entries()) {
    for (const b of singles.slice(i + 1)) expect(errorOf(a, b)).toBeGreaterThan(100 * SAME);
  }
  const open = Array.from({ length: 18 }, (_, i) => forward(i % 3, i % 6, STYLES[i % 6]));
  const answers = await Promise.all(open);
  for (const [i, answer] of answers.entries()) {
    expect(errorOf(await out(answer), singles[i % 6]!), `request ${i}`).toBeLessThan(SAME);
  }
  expect(Math.max(...answers.map(({ timing }) => timing!.batchedRequests))).toBeGreaterThan(2);
  for (const { timing } of answers) expect(timing!.batch).toBeGreaterThanOrEqual(timing!.batchedRequests);
});

test('the same input with another LoRA in each row gives each row its own result', async () => {
  const singles: Tensor[] = [];
  for (const style of STYLES) singles.push(await out(forward(0, 1, style)));
  const order = [5, 3, 1, 0, 2, 4, 4, 0];
  const answers = await Promise.all(order.map((style, i) => forward(i % 3, 1, STYLES[style])));
  for (const [i, answer] of answers.entries()) {
    expect(errorOf(await out(answer), singles[order[i]!]!), `row ${i}`).toBeLessThan(SAME);
  }
  expect(Math.max(...answers.map(({ timing }) => timing!.batchedRequests))).toBeGreaterThan(1);
});

test('requests of several images, context lengths and sizes beside each other give their own results', async () => {
  const shapes: readonly Tensors[] = [
    new Map(),
    new Map([['context', f32([1, 9, 64], noise(576, 9))]]),
    new Map([['x', f32([1, 3, 8, 16], noise(384, 3))]]),
    new Map([
      ['x', f32([3, 3, 16, 16], noise(2304, 4))],
      ['timesteps', f32([3], [1, 500, 999])],
      ['context', f32([3, 4, 64], noise(768, 4))],
    ]),
  ];
  const singles: Tensor[] = [];
  for (const changes of shapes) singles.push(await out(forward(0, 2, STYLES[4], changes)));
  const answers = await Promise.all(
    [0, 1, 2, 3, 3, 2, 1, 0].map((i, at) => forward(at % 3, 2, STYLES[4], shapes[i])),
  );
  for (const [at, answer] of answers.entries()) {
    expect(errorOf(await out(answer), singles[at < 4 ? at : 7 - at]!), `request ${at}`).toBeLessThan(SAME);
  }
});

test('a request of more images than a batch holds is answered whole', async () => {
  const x = reference.get('x')!;
  const many = (tensor: Tensor): Tensor => {
    const one = rows(tensor, 0, 1);
    return { ...one, shape: [11, ...one.shape.slice(1)], data: Buffer.concat(Array(11).fill(one.data)) };
  };
  const small = { ...x, shape: [8, 3, 16, 16] };
  const changes: Tensors = new Map([
    ['x', many(small)],
    ['timesteps', many(reference.get('timesteps')!)],
    ['context', many(reference.get('context')!)],
  ]);
  const single = new Map([...changes].map(([name, tensor]) => [name, rows(tensor, 0, 1)]));
  const expected = await out(forward(0, 0, STYLES[1], single));
  const all = await out(forward(0, 0, STYLES[1], changes));
  expect(all.shape).toEqual([11, 3, 16, 16]);
  for (let row = 0; row < 11; row += 1) {
    expect(errorOf(rows(all, row, row + 1), expected), `row ${row}`).toBeLessThan(SAME);
  }
});

test('a wrong request, or one full of NaN, fails alone', async () => {
  const good = await out(forward(0, 3, STYLES[2]));
  const nan: Tensors = new Map([['x', f32([1, 3, 16, 16], Array(768).fill(Number.NaN))]]);
  const huge: Tensors = new Map([['x', f32([1, 3, 16, 16], Array(768).fill(1e30))]]);
  const open = [
    ...[0, 1, 2].map((client) => forward(client, 3, STYLES[2])),
    forward(0, 3, STYLES[1], nan),
    forward(1, 3, STYLES[2]),
    forward(1, 3, use(['ink', 1e38])),
    forward(0, 3, use(['zz', 1])),
    forward(2, 3, STYLES[2]),
    forward(2, 3, {}, huge),
    forward(2, 3, { loras: [{ lora: 'ink.safetensors', strength: null }] }),
    forward(1, 3, STYLES[2], new Map([['context', f32([1, 4, 32], noise(128, 1))]])),
    forward(0, 3, STYLES[2]),
  ];
  const answers = await Promise.all(open);
  for (const i of [0, 1, 2, 4, 7, 11])
    expect(errorOf(await out(answers[i]!), good), `request ${i}`).toBeLessThan(SAME);
  const codes = [6, 9, 10].map((i) => answers[i]!.error?.code);
  expect(codes).toEqual(['ERR_UNKNOWN_LORA', 'ERR_BAD_STRENGTH', 'ERR_BAD_SHAPE']);
});

test('a cancel in the queue drops that request and no other', async () => {
  const good = await out(forward(0, 4, STYLES[3]));
  const open = Array.from({ length: 15 }, (_, i) => forward(i % 3, 4, STYLES[3]));
  const targets = [...connections[1]!.sent];
  const cancels = await Promise.all(targets.map((target) => connections[1]!.ask('cancel', { target })));
  const answers = await Promise.all(open);
  for (const [i, answer] of answers.entries()) {
    if (i % 3 === 1) {
      const { cancelled } = cancels[Math.floor(i / 3)]!.result;
      expect(answer.error?.code, String(i)).toBe(cancelled ? 'ERR_CANCELLED' : undefined);
    } else expect(errorOf(await out(answer), good), String(i)).toBeLessThan(SAME);
  }
  expect(cancels.filter(({ result }) => result.cancelled).length).toBeGreaterThan(1);
});

test('a full queue is answered ERR_BUSY with a time to wait, and empties', async () => {
  const answers = await Promise.all(Array.from({ length: 60 }, (_, i) => forward(i % 3, 5)));
  const busy = answers.filter(({ ok }) => !ok);
  expect(busy.length).toBeGreaterThan(0);
  expect(answers.length - busy.length).toBeGreaterThanOrEqual(24);
  for (const { error } of busy) {
    expect(error!.code).toBe('ERR_BUSY');
    expect(error!.details.retryAfterMs).toBeGreaterThan(0);
  }
  expect((await forward(0, 5)).ok).toBe(true);
});

test('a connection that is lost takes its requests with it, and the others are answered', async () => {
  const leaving = await server.open();
  const tensors = inputsOf(5);
  const lost = Array.from({ length: 4 }, () => leaving.send('forward', { model: MODEL }, tensors));
  const ended = Promise.allSettled(lost);
  const staying = [0, 1, 2].map((client) => forward(client, 5));
  leaving.socket.terminate();
  for (const answer of await Promise.all(staying)) expect(answer.ok).toBe(true);
  expect((await ended).map(({ status }) => status)).toEqual(Array(4).fill('rejected'));
});
