/**
 * What one client uploads changes nothing of what another gets under a digest or a name, on the real server. How uploads work
 * at all is uploads.test.ts.
 */
import { copyFileSync, mkdtempSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Client, Fields, Message } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { outOf, sendForward, small } from './small.ts';
import { digestOf, encode, errorOf, f16, f32, readTensors, type Tensor, type Tensors } from './tensors.ts';

const folder = mkdtempSync(join(tmpdir(), 'unetd-poison-'));
const OPERATORS = join(folder, 'mine.safetensors');
const ink = readTensors(`${ASSETS}loras/ink.safetensors`).tensors;
const neon = readTensors(`${ASSETS}loras/neon.safetensors`).tensors;
/** LoRA `ink` with one matrix of ones: as valid, and another adapter. */
const forged = edited(ink, (name, tensor) =>
  name === [...ink.keys()].find((key) => key.endsWith('.lora_up.weight'))
    ? { ...tensor, data: Buffer.alloc(tensor.data.length, Buffer.of(0, 0x3c)) }
    : tensor,
);
/** Rounding depends on the batch; another adapter is a thousand times as far off. */
const SAME = 1e-5;

function edited(tensors: Tensors, edit: (name: string, tensor: Tensor) => Tensor): Tensors {
  return new Map([...tensors].map(([name, tensor]) => [name, edit(name, tensor)]));
}

const put = (client: Client, digest: string, tensors: Tensors, fields: Fields = {}): Promise<Message> =>
  client.send('lora.put', { digest, ...fields }, tensors);
const outWith = (client: Client, lora: string): Promise<Tensor> =>
  outOf(client, small, { loras: [{ lora, strength: 1 }] });

let server: Server;
let victim: Client;
let attacker: Client;
/** Results of the three adapters under names of the operator. */
const right = { ink: small.get('x')!, neon: small.get('x')!, forged: small.get('x')! };

beforeAll(async () => {
  writeFileSync(join(folder, 'forged.safetensors'), encode({}, forged));
  server = await serve('--dtype', 'f32', '--loras', folder);
  const client = await server.open();
  for (const lora of ['ink', 'neon', 'forged'] as const)
    right[lora] = await outWith(client, `${lora}.safetensors`);
  await client.close();
  for (const other of [right.neon, right.forged]) expect(errorOf(other, right.ink)).toBeGreaterThan(1e-2);
});
afterAll(async () => {
  await server?.stop();
  rmSync(folder, { recursive: true });
});
beforeEach(async () => {
  victim = await server.open();
  attacker = await server.open();
});
afterEach(async () => {
  for (const client of [victim, attacker]) expect(await client.finish()).toEqual([]);
});

async function expectRight(lora: string, which: keyof typeof right): Promise<void> {
  expect(errorOf(await outWith(victim, lora), right[which]), `${lora} is ${which}`).toBeLessThan(SAME);
}

test('other tensors under a digest are refused before the owner comes, and unread after', async () => {
  const digest = digestOf(ink);
  const lie = await put(attacker, digest, forged);
  expect(lie.error).toMatchObject({
    code: 'ERR_DIGEST_MISMATCH',
    details: { expected: digest, actual: digestOf(forged) },
  });
  expect((await victim.ask('lora.has', { digests: [digest] })).result.missing).toEqual([digest]);
  expect((await put(victim, digest, ink)).result.complete).toBe(true);
  await expectRight(`sha256:${digest}`, 'ink');
  expect((await put(attacker, digest, forged)).result.complete).toBe(true);
  await expectRight(`sha256:${digest}`, 'ink');
});

test('a part of one connection never gets into the upload of another', async () => {
  const digest = digestOf(neon);
  const entries = [...neon];
  const parts = [0, 1, 2].map((i): Tensors => new Map(entries.filter((_, at) => at % 3 === i)));
  const bad = edited(parts[1]!, (_, tensor) => ({ ...tensor, data: Buffer.alloc(tensor.data.length, 7) }));
  const part = (client: Client, i: number, tensors: Tensors): Promise<Message> =>
    put(client, digest, tensors, { part: i, parts: 3 });
  await part(victim, 0, parts[0]!);
  expect((await part(attacker, 1, bad)).error).toMatchObject({ code: 'ERR_BAD_REQUEST' });
  // Alongside, as an upload of its own, too.
  await part(attacker, 0, parts[0]!);
  await part(attacker, 1, bad);
  await part(victim, 1, parts[1]!);
  expect((await part(attacker, 2, parts[2]!)).error).toMatchObject({ code: 'ERR_DIGEST_MISMATCH' });
  expect((await part(victim, 2, parts[2]!)).result.complete).toBe(true);
  await expectRight(`sha256:${digest}`, 'neon');
});

test('a name that holds what lies between two tensors makes no digest of other tensors', async () => {
  // `a`, its dtype, shape and data, then the name `b`: the bytes that are hashed are those of {a, b}.
  const b = f16([1, 1], [0.5]);
  const honest: Tensors = new Map([
    ['a.alpha', f32([], [8])],
    ['b.lora_down.weight', b],
  ]);
  const eight = Buffer.from(f32([], [8]).data).toString('latin1');
  const merged: Tensors = new Map([[`a.alpha\0F32\0\0${eight}b.lora_down.weight`, b]]);
  const digest = digestOf(honest);
  expect(digestOf(merged)).toBe(digest);
  const req = JSON.stringify({ id: 'lie', op: 'lora.put', digest });
  const { error } = await attacker.complain(encode({ req }, merged));
  expect(error).toMatchObject({ code: 'ERR_BAD_FRAME', message: expect.stringContaining('NUL') });
  expect((await victim.ask('lora.has', { digests: [digest] })).result.missing).toEqual([digest]);
});

test('an upload in another order and with other metadata is the adapter of its digest, for everybody', async () => {
  // New tensors, so that this upload is the first of its digest: `ink` and a tensor that names no layer.
  const tensors: Tensors = new Map([...ink, ['note', f32([1], [1])]]);
  const digest = digestOf(tensors);
  const shuffled = [...tensors].sort(([, a], [, b]) => Buffer.compare(a.data, b.data));
  const id = attacker.newId();
  const answer = attacker.answerTo(id);
  const req = JSON.stringify({ id, op: 'lora.put', digest });
  const metadata = { ss_network_alpha: '1000', ss_network_dim: '1', format: 'pt' };
  attacker.socket.send(encode({ ...metadata, req }, new Map(shuffled)));
  expect((await answer).result.complete).toBe(true);
  await outWith(attacker, `sha256:${digest}`);
  expect((await put(victim, digest, tensors)).result.complete).toBe(true);
  await expectRight(`sha256:${digest}`, 'ink');
});

test('an upload has no name but its digest, and no file and no model has that name', async () => {
  const digest = digestOf(forged);
  await put(attacker, digest, forged);
  const before = (await victim.ask('loras.list')).result;
  for (const name of [digest, `sha256:${digest}.safetensors`, `./sha256:${digest}`, `SHA256:${digest}`]) {
    const { error } = await sendForward(victim, small, { loras: [{ lora: name, strength: 1 }] });
    expect(error?.code, name).toMatch(/ERR_BAD_REQUEST|ERR_UNKNOWN_LORA/);
  }
  const { error } = await victim.ask('model.load', { model: `sha256:${digest}` });
  expect(error).toMatchObject({ code: 'ERR_UNKNOWN_MODEL' });
  expect((await victim.ask('loras.list')).result).toEqual(before);
  await expectRight('ink.safetensors', 'ink');
  await expectRight(`sha256:${digest}`, 'forged');
});

test('a model that is put under the digest of a LoRA is no LoRA, nor the reverse', async () => {
  const tensors: Tensors = new Map([...neon, ['note', f32([1], [2])]]);
  const digest = digestOf(tensors);
  expect((await attacker.send('model.put', { digest }, tensors)).result.complete).toBe(true);
  expect((await victim.ask('lora.has', { digests: [digest] })).result.missing).toEqual([digest]);
  expect(
    (await sendForward(victim, small, { loras: [{ lora: `sha256:${digest}`, strength: 1 }] })).error,
  ).toMatchObject({ code: 'ERR_UNKNOWN_LORA' });
  expect((await put(victim, digest, tensors)).result.complete).toBe(true);
  await expectRight(`sha256:${digest}`, 'neon');
  const { error } = await victim.ask('model.load', { model: `sha256:${digest}` });
  expect(error).toMatchObject({ code: 'ERR_MODEL_INVALID' });
});

test('a file and an upload with the same tensors lie on the GPU once, and part when the file changes', async () => {
  copyFileSync(join(folder, 'forged.safetensors'), OPERATORS);
  const digest = digestOf(forged);
  await put(victim, digest, forged);
  await expectRight(`sha256:${digest}`, 'forged');
  const { turnover } = (await victim.ask('stats')).result.engine;
  await expectRight('mine.safetensors', 'forged');
  expect((await victim.ask('stats')).result.engine.turnover).toEqual(turnover);
  const next = join(folder, 'next');
  copyFileSync(`${ASSETS}loras/neon.safetensors`, next);
  renameSync(next, OPERATORS);
  await pause(1100);
  await expectRight('mine.safetensors', 'neon');
  await expectRight(`sha256:${digest}`, 'forged');
});

test('adapters of both in one batch stay with who named them', async () => {
  const digest = digestOf(forged);
  await put(attacker, digest, forged);
  const names = [`sha256:${digest}`, 'ink.safetensors', 'neon.safetensors'] as const;
  const expected = [right.forged, right.ink, right.neon];
  for (let round = 0; round < 5; round++) {
    const outs = await Promise.all(
      names.map((lora, i) => outWith([attacker, victim][(i + round) % 2]!, lora)),
    );
    for (const [i, out] of outs.entries()) expect(errorOf(out, expected[i]!), names[i]).toBeLessThan(SAME);
  }
});

test('the model is what it was', async () => {
  const { models } = (await victim.ask('models.list')).result;
  expect(models.map(({ name }: { name: string }) => name)).toEqual([MODEL]);
  await expectRight('ink.safetensors', 'ink');
});
