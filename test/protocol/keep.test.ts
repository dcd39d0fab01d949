/**
 * Tensors that the server keeps for a connection: `keep`, `reuse`, and what becomes of keys that are gone.
 * It is not about what a forward computes; see `forward.test.ts`.
 */
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Client, Fields, Message } from './client.ts';
import { MODEL, type Server, serve } from './server.ts';
import { changed, expectRefusal, noise, outOf, sendForward, small } from './small.ts';
import { errorOf, f32, type Tensor, type Tensors } from './tensors.ts';

let server: Server;
let client: Client;

beforeAll(async () => {
  server = await serve();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  client = await server.open();
});
afterEach(async () => {
  expect(await client.finish()).toEqual([]);
});

const forward = (tensors: Tensors, fields: Fields = {}): Promise<Message> =>
  sendForward(client, tensors, fields);
const out = (tensors: Tensors, fields: Fields = {}): Promise<Tensor> => outOf(client, tensors, fields);
const expectError = (tensors: Tensors, fields: Fields, code: string): Promise<void> =>
  expectRefusal(client, tensors, fields, code);

test('kept tensors stand in for tensors that are not sent', async () => {
  const expected = await out(small, { keep: { x: 'a', timesteps: 'b', context: '__proto__' } });
  const reuse = { x: 'a', timesteps: 'b', context: '__proto__' };
  expect(errorOf(await out(new Map(), { reuse }), expected)).toBe(0);
  const other = await out(changed({ context: f32([1, 1, 64], noise(64)) }), { keep: { context: 'a' } });
  expect(errorOf(other, expected)).toBeGreaterThan(0);
  expect(errorOf(await out(changed({ context: null }), { reuse: { context: 'a' } }), other)).toBe(0);
});

test('a reuse may follow its keep at once, and a keep outlives its request', async () => {
  const first = forward(small, { keep: { context: 'k'.repeat(256) } });
  const second = forward(changed({ context: null }), { reuse: { context: 'k'.repeat(256) } });
  expect(errorOf((await second).tensors!.get('out'), (await first).tensors!.get('out')!)).toBe(0);
  await expectError(
    small,
    { keep: { x: 'late' }, loras: [{ lora: 'zz.safetensors', strength: 1 }] },
    'ERR_UNKNOWN_LORA',
  );
  expect(errorOf(await out(changed({ x: null }), { reuse: { x: 'late' } }), await out(small))).toBe(0);
});

test('a key that is not kept on this connection is answered ERR_NOT_KEPT', async () => {
  await forward(small, { keep: { context: 'mine' } });
  const without = changed({ context: null });
  for (const key of ['yours', 'constructor', 'Mine'])
    await expectError(without, { reuse: { context: key } }, 'ERR_NOT_KEPT');
  const other = await server.open();
  const { error } = await other.send('forward', { model: MODEL, reuse: { context: 'mine' } }, without);
  expect(error!.code).toBe('ERR_NOT_KEPT');
  expect(await other.finish()).toEqual([]);
});

test('tensors unused for longest are dropped when much is kept, and those in use stay', async () => {
  await forward(small, { keep: { timesteps: 'used' } });
  const olds = Array.from({ length: 30 }, (_, i) => `old${i}`);
  // A wrong model costs no forward: what is kept is kept when the request is read.
  const model = 'zz.safetensors';
  await Promise.all(olds.map((key) => forward(small, { model, keep: { context: key } })));
  const large = { dtype: 'F32', shape: [10_000_000], data: new Uint8Array(40_000_000) };
  let dropped = false;
  for (let round = 0; round < 30 && !dropped; round += 1) {
    await forward(changed({ x: large }), { model, keep: { x: `large${round}` } });
    const used = await forward(changed({ timesteps: null }), { model, reuse: { timesteps: 'used' } });
    expect(used.error!.code).toBe('ERR_UNKNOWN_MODEL');
    const old = await forward(changed({ context: null }), { model, reuse: { context: olds[round]! } });
    dropped = old.error!.code === 'ERR_NOT_KEPT';
  }
  expect(dropped).toBe(true);
  expect((await forward(changed({ timesteps: null }), { reuse: { timesteps: 'used' } })).ok).toBe(true);
});

test('wrong keeps and reuses are refused', async () => {
  for (const wrong of [null, [], 'x', { x: 1 }, { x: '' }, { x: 'k'.repeat(257) }, { x: null }]) {
    await expectError(small, { keep: wrong }, 'ERR_BAD_REQUEST');
    await expectError(changed({ x: null }), { reuse: wrong }, 'ERR_BAD_REQUEST');
  }
  await expectError(small, { keep: { nothing: 'key' } }, 'ERR_BAD_REQUEST');
  await forward(small, { keep: { x: 'key' } });
  await expectError(small, { reuse: { x: 'key' } }, 'ERR_BAD_REQUEST');
  await expectError(small, { reuse: { nothing: 'key' } }, 'ERR_UNEXPECTED_TENSOR');
});
