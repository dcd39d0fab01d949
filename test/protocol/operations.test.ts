/**
 * Every operation in a text frame: its fields, its result, its errors, and the rules for open requests.
 * It is not about uploads, forwards or frames that cannot be read; each has a file beside this one.
 */
import { statSync } from 'node:fs';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Client, Fields } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { encode, readTensors, type Tensors } from './tensors.ts';

const LORAS = ['ink.safetensors', 'neon.safetensors', 'terracotta.safetensors'];
const UNKNOWN = `sha256:${'0'.repeat(64)}`;
const BIAS = 'model.diffusion_model.out.2.bias';
const LARGE = 'model.diffusion_model.input_blocks.1.0.in_layers.2.weight';
const reference = readTensors(`${ASSETS}reference.safetensors`).tensors;
const inputs: Tensors = new Map(['x', 'timesteps', 'context'].map((name) => [name, reference.get(name)!]));
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

async function expectError(op: string, fields: Fields, code: string): Promise<void> {
  const { ok, error } = await client.ask(op, fields);
  const note = `${op} ${JSON.stringify(fields).slice(0, 100)}`;
  expect(ok, note).toBe(false);
  expect(error, note).toEqual({ code, message: expect.stringMatching(/.{10}/), details: expect.any(Object) });
}

test('the lists give the files of the folders by name and size', async () => {
  const { models } = (await client.ask('models.list')).result;
  const sizeBytes = statSync(`${ASSETS}models/${MODEL}`).size;
  expect(models).toEqual([{ name: MODEL, sizeBytes, version: expect.any(String), loaded: false }]);
  const { loras } = (await client.ask('loras.list')).result;
  expect(loras).toEqual(LORAS.map((name) => ({ name, sizeBytes: statSync(`${ASSETS}loras/${name}`).size })));
});

test('the header of a model is what its file states, and loads nothing', async () => {
  const file = readTensors(`${ASSETS}models/${MODEL}`);
  const { header, tensors } = await client.ask('model.header', { model: MODEL });
  expect(header!.metadata).toEqual(file.metadata);
  const stated = [...file.tensors].map(([name, { dtype, shape }]) => [name, { dtype, shape }]);
  expect(header!.tensors).toEqual(Object.fromEntries(stated));
  expect([...tensors!.keys()]).toEqual([]);
  const values = [...file.tensors.keys()].filter((name) => file.tensors.get(name)!.data.length <= 65_536);
  const answer = await client.ask('model.header', { model: MODEL, values });
  expect([...answer.tensors!.keys()].sort()).toEqual([...values].sort());
  for (const [name, { dtype, shape, data }] of answer.tensors!) {
    const tensor = file.tensors.get(name)!;
    expect([dtype, shape], name).toEqual([tensor.dtype, tensor.shape]);
    expect(Buffer.compare(data, tensor.data), name).toBe(0);
  }
  expect((await client.ask('models.list')).result.models[0].loaded).toBe(false);
});

test('the values of a header are named, few and small', async () => {
  const ask = (values: unknown, code: string) => expectError('model.header', { model: MODEL, values }, code);
  await ask('x', 'ERR_BAD_REQUEST');
  await ask([1], 'ERR_BAD_REQUEST');
  await ask(['nothing'], 'ERR_BAD_REQUEST');
  await ask(['__metadata__'], 'ERR_BAD_REQUEST');
  await ask([LARGE], 'ERR_TOO_LARGE');
  await ask(Array(1025).fill(BIAS), 'ERR_TOO_LARGE');
});

test('a load reports its progress, says what it loaded, and returns at once the second time', async () => {
  await expectError('model.unload', { model: MODEL }, 'ERR_MODEL_NOT_LOADED');
  const { id, result } = await client.ask('model.load', { model: MODEL, dtype: 'f16' });
  expect(result).toEqual({
    model: MODEL,
    version: expect.any(String),
    dtype: 'f16',
    config: expect.any(Object),
    sizeBytes: expect.any(Number),
  });
  const progress = client.progressOf(id!);
  expect(progress.length).toBeGreaterThan(0);
  for (const event of progress) {
    expect(event).toEqual({
      id,
      event: 'progress',
      stage: expect.any(String),
      done: expect.any(Number),
      total: expect.any(Number),
    });
    expect(event.done).toBeLessThanOrEqual(event.total as number);
  }
  const again = await client.ask('model.load', { model: MODEL, dtype: 'f16' });
  expect(again.result).toEqual(result);
  expect(client.progressOf(again.id!)).toEqual([]);
  const [listed] = (await client.ask('models.list')).result.models;
  expect(listed).toMatchObject({ name: MODEL, version: result.version, loaded: true, config: result.config });
});

test('the config describes the UNet', async () => {
  const { config } = (await client.ask('model.load', { model: MODEL })).result;
  expect(config).toMatchObject({
    inChannels: 3,
    outChannels: 3,
    modelChannels: 64,
    timeEmbedDim: 256,
    contextDim: 64,
    admChannels: null,
  });
  expect(config.input).toHaveLength(6);
  expect(config.output).toHaveLength(6);
  for (const block of [...config.input, config.middle, ...config.output]) {
    for (const module of block)
      expect(module).toMatchObject({ kind: expect.any(String), id: expect.any(String) });
  }
  expect(config.input[2][0].kind).toBe('down');
});

test('another dtype loads anew, and an unloaded model can be loaded again', async () => {
  const half = (await client.ask('model.load', { model: MODEL, dtype: 'f16' })).result;
  const full = (await client.ask('model.load', { model: MODEL, dtype: 'f32' })).result;
  expect(full).toEqual({ ...half, dtype: 'f32', sizeBytes: expect.any(Number) });
  expect(full.sizeBytes).toBeGreaterThan(half.sizeBytes);
  expect((await client.ask('model.unload', { model: MODEL })).result).toEqual({});
  expect((await client.ask('models.list')).result.models[0].loaded).toBe(false);
  await expectError('model.unload', { model: MODEL }, 'ERR_MODEL_NOT_LOADED');
  expect((await client.ask('model.load', { model: MODEL, dtype: 'auto' })).ok).toBe(true);
});

test('a model in use is neither unloaded nor loaded anew, and its requests are answered', async () => {
  await client.ask('model.load', { model: MODEL, dtype: 'f16' });
  const open = [1, 2].map(() => client.send('forward', { model: MODEL }, inputs));
  await expectError('model.unload', { model: MODEL }, 'ERR_MODEL_BUSY');
  await expectError('model.load', { model: MODEL, dtype: 'f32' }, 'ERR_MODEL_BUSY');
  expect((await client.ask('model.load', { model: MODEL })).ok).toBe(true);
  for (const answer of await Promise.all(open)) expect(answer.ok).toBe(true);
});

test('a LoRA is loaded by name and says what matched', async () => {
  await client.ask('model.unload', { model: MODEL });
  for (const lora of LORAS) {
    const { result } = await client.ask('lora.load', { lora, model: MODEL });
    expect(result).toEqual({
      digest: expect.stringMatching(/^[0-9a-f]{64}$/),
      format: expect.any(String),
      rank: expect.any(Number),
      layers: expect.any(Number),
      matched: readTensors(`${ASSETS}loras/${lora}`).tensors.size,
      unmatched: [],
      textEncoder: [],
      sizeBytes: expect.any(Number),
    });
  }
  expect((await client.ask('models.list')).result.models[0].loaded).toBe(true);
});

test('models and LoRAs that are not there are named as unknown', async () => {
  for (const model of ['other.safetensors', 'folder/other.safetensors', LORAS[0], UNKNOWN]) {
    for (const op of ['model.load', 'model.unload', 'model.header'])
      await expectError(op, { model }, 'ERR_UNKNOWN_MODEL');
    await expectError('lora.load', { lora: LORAS[0], model }, 'ERR_UNKNOWN_MODEL');
  }
  for (const lora of ['other.safetensors', MODEL, UNKNOWN]) {
    await expectError('lora.load', { lora, model: MODEL }, 'ERR_UNKNOWN_LORA');
  }
});

test('a name that could leave the folders, or is none, is refused', async () => {
  const wrong = [
    undefined,
    null,
    3,
    '',
    [MODEL],
    `../models/${MODEL}`,
    `./${MODEL}`,
    `a/../${MODEL}`,
    `/${MODEL}`,
    '/etc/passwd',
  ];
  for (const name of [
    ...wrong,
    `..\\${MODEL}`,
    `a\0${MODEL}`,
    'model.ckpt',
    'sha256:',
    'sha256:zz',
    `sha256:${'A'.repeat(64)}`,
  ]) {
    for (const op of ['model.load', 'model.unload', 'model.header'])
      await expectError(op, { model: name }, 'ERR_BAD_REQUEST');
    await expectError('lora.load', { model: MODEL, lora: name }, 'ERR_BAD_REQUEST');
  }
});

test('an unknown dtype, an unknown field and an unknown operation are refused', async () => {
  for (const dtype of ['f8', 'bf16', 'F32', '', 3, null]) {
    await expectError('model.load', { model: MODEL, dtype }, 'ERR_BAD_REQUEST');
  }
  const fields: Readonly<Record<string, Fields>> = {
    'models.list': {},
    'loras.list': {},
    stats: {},
    'model.load': { model: MODEL },
    'model.unload': { model: MODEL },
    'model.header': { model: MODEL },
    'model.has': { digests: [] },
    'lora.has': { digests: [] },
    'lora.load': { lora: LORAS[0], model: MODEL },
    cancel: { target: 'none' },
  };
  for (const [op, rest] of Object.entries(fields)) {
    await expectError(op, { ...rest, surprise: 1 }, 'ERR_BAD_REQUEST');
  }
  for (const op of ['', 'nothing', 'Stats', 'constructor', '__proto__', 'toString']) {
    const { error } = await client.ask(op);
    expect(error!.code, op).toMatch(op === '' ? /^ERR_(UNKNOWN_OP|BAD_REQUEST)$/ : /^ERR_UNKNOWN_OP$/);
  }
  expect((await client.send('nothing', {}, new Map())).error!.code).toBe('ERR_UNKNOWN_OP');
  await expectError(undefined as unknown as string, {}, 'ERR_BAD_REQUEST');
});

test('an id may be any string of 1 to 256 characters, and may be used again once answered', async () => {
  for (const id of ['7', ' ', 'a'.repeat(256), '__proto__', 'constructor', 'é漢🙂', '"\\\n\0']) {
    for (let round = 0; round < 2; round += 1) {
      const from = client.messages.length;
      client.socket.send(JSON.stringify({ id, op: 'loras.list' }));
      expect((await client.until((message) => message.id === id, from)).ok, id).toBe(true);
    }
    client.messages.splice(1);
  }
});

test('the id of an open request is refused with id null, and the open request is answered', async () => {
  const id = client.newId();
  const first = client.answerTo(id);
  const bytes = encode({ req: JSON.stringify({ id, op: 'forward', model: MODEL }) }, inputs);
  client.socket.send(bytes);
  for (const again of [bytes, JSON.stringify({ id, op: 'stats' })]) {
    const { error } = await client.complain(again);
    expect(error).toMatchObject({ code: 'ERR_DUPLICATE_ID', details: { id } });
  }
  expect((await first).ok).toBe(true);
  const other = await server.open();
  const both = [
    client.send('forward', { model: MODEL }, inputs),
    other.send('forward', { model: MODEL }, inputs),
  ];
  for (const answer of await Promise.all(both)) expect(answer.ok).toBe(true);
  expect(await other.finish()).toEqual([]);
});

test('more open requests than the window are answered ERR_BUSY, and a cancel needs no room', async () => {
  const { maxInFlight } = client.hello.limits!;
  const open = Array.from({ length: maxInFlight + 3 }, () =>
    client.send('forward', { model: MODEL }, inputs),
  );
  const ids = [...client.sent];
  const cancels = await Promise.all(ids.map((target) => client.ask('cancel', { target })));
  const answers = await Promise.all(open);
  expect(answers.slice(maxInFlight).map(({ error }) => error?.code)).toEqual(Array(3).fill('ERR_BUSY'));
  for (const [i, { result }] of cancels.entries()) {
    expect(answers[i]!.error?.code === 'ERR_CANCELLED', String(i)).toBe(result.cancelled);
  }
  expect(cancels.filter(({ result }) => result.cancelled).length).toBeGreaterThan(maxInFlight / 2);
});

test('a cancel of the request that runs is answered at once', async () => {
  const running = client.send('forward', { model: MODEL }, inputs);
  const target = [...client.sent].at(-1);
  await client.ask('stats');
  expect((await client.ask('cancel', { target })).result).toEqual({ cancelled: true });
  expect((await running).error!.code).toBe('ERR_CANCELLED');
  expect((await client.ask('cancel', { target })).result).toEqual({ cancelled: false });
});

test('a cancel reaches only the requests of its own connection, and needs a target', async () => {
  const other = await server.open();
  const open = client.send('forward', { model: MODEL }, inputs);
  const target = [...client.sent].at(-1);
  expect((await other.ask('cancel', { target })).result).toEqual({ cancelled: false });
  expect((await open).ok).toBe(true);
  for (const wrong of [undefined, null, 7, []])
    await expectError('cancel', { target: wrong }, 'ERR_BAD_REQUEST');
  expect(await other.finish()).toEqual([]);
});

test('stats are an object', async () => {
  const { result } = await client.ask('stats');
  expect(Object.keys(result).length).toBeGreaterThan(0);
});
