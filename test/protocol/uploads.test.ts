/**
 * Models and LoRAs that a client uploads: digests, parts, and use under `sha256:HEX`.
 * It is not about the files in the server's folders, but for comparison with them.
 */
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Client, Fields, Message } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import {
  digestOf,
  encode,
  errorOf,
  f16,
  f32,
  readTensors,
  rows,
  type Tensor,
  type Tensors,
} from './tensors.ts';

const reference = readTensors(`${ASSETS}reference.safetensors`).tensors;
const inputs: Tensors = new Map(
  ['x', 'timesteps', 'context'].map((name) => [name, rows(reference.get(name)!, 0, 1)]),
);
const ink = readTensors(`${ASSETS}loras/ink.safetensors`).tensors;
const LAYER = 'lora_unet_input_blocks_3_1_proj_in';
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

function cut(tensors: Tensors, parts: number): Tensors[] {
  const entries = [...tensors];
  const size = Math.ceil(entries.length / parts);
  return Array.from({ length: parts }, (_, i) => new Map(entries.slice(i * size, (i + 1) * size)));
}

const half = (...shape: number[]): Tensor => f16(shape, Array(shape.reduce((a, b) => a * b, 1)).fill(0.01));
const put = (op: string, fields: Fields, tensors: Tensors): Promise<Message> =>
  client.send(op, fields, tensors);
const missing = async (op: string, ...digests: string[]): Promise<string[]> =>
  (await client.ask(op, { digests })).result.missing as string[];

async function forward(fields: Fields): Promise<Tensor> {
  const answer = await client.send('forward', { model: MODEL, ...fields }, inputs);
  expect(answer.error).toBeUndefined();
  return answer.tensors!.get('out')!;
}

test('the digest is computed as the document shows', () => {
  const tensors: Tensors = new Map([
    ['b', f32([2], [1, 2])],
    ['a', f16([1, 1], [0.5])],
  ]);
  expect(digestOf(tensors)).toBe('1c88068862220108bebb916a569704bac85c4c270e8c82a9090a1b231e91ce8e');
});

test('a LoRA uploaded whole gives the same result as the file of that name', async () => {
  const digest = digestOf(ink);
  expect(await missing('lora.has', digest)).toEqual([digest]);
  expect((await put('lora.put', { digest }, ink)).result).toEqual({ digest, complete: true });
  expect(await missing('lora.has', digest)).toEqual([]);
  expect(await missing('model.has', digest)).toEqual([digest]);
  const lora = `sha256:${digest}`;
  const byDigest = await client.ask('lora.load', { lora, model: MODEL });
  const byName = await client.ask('lora.load', { lora: 'ink.safetensors', model: MODEL });
  expect(byDigest.result).toEqual(byName.result);
  expect(byDigest.result.digest).toBe(digest);
  const expected = await forward({ loras: [{ lora: 'ink.safetensors', strength: 1 }] });
  expect(errorOf(await forward({ loras: [{ lora, strength: 1 }] }), expected)).toBe(0);
  expect((await client.ask('loras.list')).result.loras).toHaveLength(3);
});

test('an upload can be used from every connection', async () => {
  const digest = digestOf(ink);
  await put('lora.put', { digest }, ink);
  const other = await server.open();
  const fields = { model: MODEL, loras: [{ lora: `sha256:${digest}`, strength: 0.5 }] };
  expect((await other.send('forward', fields, inputs)).ok).toBe(true);
  expect(await other.finish()).toEqual([]);
});

test('a model uploaded in parts that are not awaited gives the same result as the file of that name', async () => {
  const tensors = readTensors(`${ASSETS}models/${MODEL}`).tensors;
  const digest = digestOf(tensors);
  expect(await missing('model.has', digest)).toEqual([digest]);
  const parts = cut(tensors, 5);
  const answers = await Promise.all(parts.map((p, part) => put('model.put', { digest, part, parts: 5 }, p)));
  expect(answers.map(({ result }) => result)).toEqual(
    answers.map((_, part) => ({ digest, complete: part === 4 })),
  );
  expect(await missing('model.has', digest)).toEqual([]);
  const model = `sha256:${digest}`;
  const expected = await forward({ loras: [{ lora: 'neon.safetensors', strength: 1 }] });
  expect(
    errorOf(await forward({ model, loras: [{ lora: 'neon.safetensors', strength: 1 }] }), expected),
  ).toBe(0);
  const loaded = await client.ask('model.load', { model });
  expect(loaded.result.model).toBe(model);
  const { header, tensors: values } = await client.ask('model.header', {
    model,
    values: ['model.diffusion_model.out.2.bias'],
  });
  expect(Object.keys(header!.tensors).sort()).toEqual([...tensors.keys()].sort());
  expect(values!.size).toBe(1);
  expect((await client.ask('models.list')).result.models).toHaveLength(1);
  expect((await client.ask('model.unload', { model })).result).toEqual({});
  expect(await missing('model.has', digest)).toEqual([]);
});

test('the digest does not depend on the order, the parts or the metadata', async () => {
  const tensors: Tensors = new Map([
    ['z', f32([], [7])],
    ['ä', f16([2, 1], [1, 2])],
    ['Z', { dtype: 'BF16', shape: [3], data: Uint8Array.of(1, 2, 3, 4, 5, 6) }],
    ['\u{1F642}', { dtype: 'U8', shape: [0, 4], data: new Uint8Array() }],
    ['\uFF5E', { dtype: 'I64', shape: [1], data: new Uint8Array(8) }],
    ['constructor', { dtype: 'BOOL', shape: [2], data: Uint8Array.of(0, 1) }],
  ]);
  const digest = digestOf(tensors);
  const [first, second] = cut(new Map([...tensors].reverse()), 2);
  expect((await put('lora.put', { digest, part: 0, parts: 2 }, first!)).result.complete).toBe(false);
  const id = client.newId();
  const answer = client.answerTo(id);
  const req = JSON.stringify({ id, op: 'lora.put', digest, part: 1, parts: 2 });
  client.socket.send(encode({ format: 'pt', note: 'ignored', req }, second!));
  expect((await answer).result).toEqual({ digest, complete: true });
});

test('tensors of every dtype are taken', async () => {
  const bytes: Readonly<Record<string, number>> = {
    BOOL: 1,
    U8: 1,
    I8: 1,
    U16: 2,
    I16: 2,
    U32: 4,
    I32: 4,
    U64: 8,
    I64: 8,
  };
  const all = { ...bytes, F16: 2, BF16: 2, F32: 4, F64: 8, F8_E4M3: 1, F8_E5M2: 1 };
  const tensors = new Map(
    Object.entries(all).map(([dtype, size]) => [
      dtype,
      { dtype, shape: [3], data: new Uint8Array(3 * size) },
    ]),
  );
  const digest = digestOf(tensors);
  expect((await put('model.put', { digest }, tensors)).result).toEqual({ digest, complete: true });
  const { header } = await client.ask('model.header', { model: `sha256:${digest}` });
  expect(Object.keys(header!.tensors).sort()).toEqual(Object.keys(all).sort());
});

test('a wrong digest is answered ERR_DIGEST_MISMATCH at the last part, and leaves nothing behind', async () => {
  const digest = 'ab'.repeat(32);
  expect((await put('lora.put', { digest }, ink)).error!.code).toBe('ERR_DIGEST_MISMATCH');
  const [first, second] = cut(ink, 2);
  expect((await put('lora.put', { digest, part: 0, parts: 2 }, first!)).result).toEqual({
    digest,
    complete: false,
  });
  expect((await put('lora.put', { digest, part: 1, parts: 2 }, second!)).error!.code).toBe(
    'ERR_DIGEST_MISMATCH',
  );
  expect(await missing('lora.has', digest)).toEqual([digest]);
  const { error } = await client.ask('lora.load', { lora: `sha256:${digest}`, model: MODEL });
  expect(error!.code).toBe('ERR_UNKNOWN_LORA');
});

test('uploading twice, whole or in parts, is free', async () => {
  const digest = digestOf(ink);
  await put('lora.put', { digest }, ink);
  expect((await put('lora.put', { digest }, ink)).result).toEqual({ digest, complete: true });
  const parts = cut(ink, 3);
  const answers = await Promise.all(parts.map((p, part) => put('lora.put', { digest, part, parts: 3 }, p)));
  expect(answers[2]!.result).toEqual({ digest, complete: true });
});

test('parts out of order or with a tensor twice are refused, and the upload begins again with part 0', async () => {
  const tensors = new Map([...ink, ['lora_te_marker.alpha', f16([], [1])]]);
  const digest = digestOf(tensors);
  const parts = cut(tensors, 3);
  const send = (i: number, fields: Fields = {}) =>
    put('lora.put', { digest, part: i, parts: 3, ...fields }, parts[i]!);
  const refused = async (answer: Promise<Message>) =>
    expect((await answer).error!.code).toBe('ERR_BAD_REQUEST');
  await refused(send(1));
  await send(0);
  await refused(send(2));
  await send(0);
  await refused(put('lora.put', { digest, part: 1, parts: 3 }, parts[0]!));
  await send(0);
  await refused(send(1, { parts: 4 }));
  for (const part of [0, 1, 2]) expect((await send(part)).result).toEqual({ digest, complete: part === 2 });
  const { result } = await client.ask('lora.load', { lora: `sha256:${digest}`, model: MODEL });
  const marker = ['lora_te_marker.alpha'];
  expect(result).toMatchObject({ matched: ink.size, unmatched: marker, textEncoder: marker });
});

test('two uploads may alternate on one connection', async () => {
  const uploads = [1, 2].map((seed) => {
    const tensors = new Map([...cut(ink, 10)[seed]!, ['a.alpha', f16([], [seed])]]);
    return { digest: digestOf(tensors), parts: cut(tensors, 2) };
  });
  const order = [0, 1].flatMap((part) =>
    uploads.map(({ digest, parts }) => ({ digest, part, tensors: parts[part]! })),
  );
  const answers = await Promise.all(
    order.map(({ digest, part, tensors }) => put('lora.put', { digest, part, parts: 2 }, tensors)),
  );
  expect(answers.map((answer) => answer.result?.complete)).toEqual([false, false, true, true]);
});

test('wrong fields of an upload are refused', async () => {
  const digest = digestOf(ink);
  for (const op of ['lora.put', 'model.put']) {
    for (const fields of [
      {},
      { digest: 3 },
      { digest: '' },
      { digest: digest.toUpperCase() },
      { digest: `sha256:${digest}` },
      { digest, parts: 0 },
      { digest, parts: 1.5 },
      { digest, part: 1 },
      { digest, part: 2, parts: 2 },
      { digest, part: -1, parts: 2 },
      { digest, part: '0', parts: 2 },
      { digest, surprise: 1 },
    ]) {
      expect((await put(op, fields, ink)).error?.code, JSON.stringify(fields)).toBe('ERR_BAD_REQUEST');
    }
  }
});

test('has takes a list of digests and gives the missing ones', async () => {
  const [a, b] = ['a'.repeat(64), 'b'.repeat(64)];
  for (const op of ['model.has', 'lora.has']) {
    expect(await missing(op)).toEqual([]);
    expect((await missing(op, a, b)).sort()).toEqual([a, b]);
    for (const digests of [undefined, a, [3], ['x'], [a.toUpperCase()], [`sha256:${a}`]]) {
      expect((await client.ask(op, { digests })).error?.code, String(digests)).toBe('ERR_BAD_REQUEST');
    }
  }
});

test('an upload that is no UNet, or no LoRA for the model, says so when it is used', async () => {
  const use = async (op: 'model' | 'lora', tensors: Tensors): Promise<string | undefined> => {
    const digest = digestOf(tensors);
    expect((await put(`${op}.put`, { digest }, tensors)).ok).toBe(true);
    const name = `sha256:${digest}`;
    const fields = op === 'model' ? { model: name } : { model: MODEL, loras: [{ lora: name, strength: 1 }] };
    const loaded = await client.ask(
      `${op}.load`,
      op === 'model' ? { model: name } : { lora: name, model: MODEL },
    );
    const ran = await client.send('forward', fields, inputs);
    expect(ran.error?.code).toBe(loaded.error?.code);
    return ran.error?.code;
  };
  const pair = (down: Tensor, up: Tensor, layer = LAYER): Tensors =>
    new Map([
      [`${layer}.lora_down.weight`, down],
      [`${layer}.lora_up.weight`, up],
    ]);
  expect(await use('model', inputs)).toBe('ERR_MODEL_INVALID');
  expect(await use('lora', pair(half(4, 64, 1, 1), half(64, 4, 1, 1)))).toBeUndefined();
  expect(await use('lora', pair(half(4, 64, 1, 1), half(64, 5, 1, 1)))).toBe('ERR_LORA_INVALID');
  expect(await use('lora', new Map([[`${LAYER}.lora_down.weight`, half(4, 64, 1, 1)]]))).toBe(
    'ERR_LORA_INVALID',
  );
  expect(await use('lora', pair(half(4, 320, 1, 1), half(320, 4, 1, 1)))).toBe('ERR_LORA_MISMATCH');
  expect(await use('lora', pair(half(4, 8), half(8, 4), 'lora_unet_nowhere'))).toBe('ERR_LORA_MISMATCH');
  const loha = ['w1_a', 'w1_b', 'w2_a', 'w2_b'].map(
    (part) => [`${LAYER}.hada_${part}`, half(...(part.endsWith('a') ? [64, 4] : [4, 64]))] as const,
  );
  expect(await use('lora', new Map(loha))).toBeUndefined();
  expect(await use('lora', new Map([[`${LAYER}.ia3_l`, half(64)]]))).toBe('ERR_LORA_UNSUPPORTED');
});
