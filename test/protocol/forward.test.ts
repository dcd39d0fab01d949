/**
 * The forward against PyTorch's outputs in `demo/assets/reference.safetensors`: dtypes, LoRA stacks, wrong fields and tensors.
 * It is not about kept tensors, control residuals or batches of several requests; each has a file beside this one.
 */
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Client, Fields, Message } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { changed, expectRefusal, noise, outOf, sendForward, small } from './small.ts';
import { errorOf, f16, f32, readTensors, rows, type Tensor, type Tensors, valuesOf } from './tensors.ts';

const TOLERANCE = { f16: 5e-3, f32: 1e-4 };
const { tensors: reference, metadata } = readTensors(`${ASSETS}reference.safetensors`);
const inputs: Tensors = new Map(['x', 'timesteps', 'context'].map((name) => [name, reference.get(name)!]));
const stack = metadata.stack!.split(',').map((entry) => {
  const [name, strength] = entry.split(':');
  return { lora: `${name}.safetensors`, strength: Number(strength) };
});
const styles: Readonly<Record<string, readonly { lora: string; strength: number }[]>> = {
  out: [],
  'out.ink': [{ lora: 'ink.safetensors', strength: 1 }],
  'out.neon': [{ lora: 'neon.safetensors', strength: 1 }],
  'out.terracotta': [{ lora: 'terracotta.safetensors', strength: 1 }],
  'out.stack': stack,
};
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

test('a model that is not loaded is loaded by the forward, which answers in the form of the document', async () => {
  expect((await client.ask('models.list')).result.models[0].loaded).toBe(false);
  const answer = await forward(inputs);
  expect({ ...answer, tensors: [...answer.tensors!.keys()] }).toEqual({
    id: answer.id,
    ok: true,
    timing: { queueMs: expect.any(Number), gpuMs: expect.any(Number), batch: 2, batchedRequests: 1 },
    tensors: ['out'],
  });
  expect(answer.tensors!.get('out')).toMatchObject({ dtype: 'F32', shape: [2, 3, 32, 32] });
  expect((await client.ask('models.list')).result.models[0].loaded).toBe(true);
});

test('the demo LoRAs change the result by more than the tolerance', () => {
  const names = Object.keys(styles);
  for (const a of names) {
    for (const b of names)
      if (a !== b)
        expect(errorOf(reference.get(a), reference.get(b)!), `${a} ${b}`).toBeGreaterThan(TOLERANCE.f16);
  }
});

for (const dtype of ['f16', 'f32'] as const) {
  test(`the base, each LoRA and a stack equal PyTorch within ${TOLERANCE[dtype]} at ${dtype}`, async () => {
    const loaded = await client.ask('model.load', { model: MODEL, dtype });
    expect(loaded.result.dtype).toBe(dtype);
    for (const [name, loras] of Object.entries(styles)) {
      expect(errorOf(await out(inputs, { loras }), reference.get(name)!), name).toBeLessThan(
        TOLERANCE[dtype],
      );
    }
    await client.ask('model.unload', { model: MODEL });
  });
}

test('a request in F16 is answered in F16 and equals PyTorch', async () => {
  const x = reference.get('x')!;
  const context = reference.get('context')!;
  const halves: Tensors = new Map([
    ...inputs,
    ['x', f16(x.shape, valuesOf(x))],
    ['context', f16(context.shape, valuesOf(context))],
  ]);
  for (const name of ['out', 'out.stack']) {
    const result = await out(halves, { loras: styles[name] });
    expect(result.dtype).toBe('F16');
    expect(errorOf(result, reference.get(name)!), name).toBeLessThan(TOLERANCE.f16);
  }
  const mixed = await out(new Map([...inputs, ['context', halves.get('context')!]]));
  expect(mixed.dtype).toBe('F32');
  expect(errorOf(mixed, reference.get('out')!)).toBeLessThan(TOLERANCE.f16);
});

test('the images of a request do not see each other', async () => {
  const single = await out(new Map([...inputs].map(([name, tensor]) => [name, rows(tensor, 1, 2)])));
  expect(errorOf(single, rows(reference.get('out')!, 1, 2))).toBeLessThan(TOLERANCE.f16);
});

test('strength 0 equals no adapter, and a LoRA leaves no trace in the next request', async () => {
  const base = await out(small);
  expect(errorOf(await out(small, { loras: [] }), base)).toBe(0);
  expect(errorOf(await out(small, { loras: [{ lora: 'ink.safetensors', strength: 0 }] }), base)).toBeLessThan(
    1e-6,
  );
  const inked = await out(small, { loras: [{ lora: 'ink.safetensors', strength: 2 }] });
  expect(errorOf(inked, base)).toBeGreaterThan(1e-3);
  expect(errorOf(await out(small), base)).toBe(0);
});

test('adapters add up, the same one twice too, and opposite strengths cancel', async () => {
  const use = (...strengths: number[]) => ({
    loras: strengths.map((strength) => ({ lora: 'neon.safetensors', strength })),
  });
  const base = await out(small);
  const once = await out(small, use(1));
  expect(errorOf(await out(small, use(0.5, 0.5)), once)).toBeLessThan(1e-3);
  expect(errorOf(await out(small, use(1, -1)), base)).toBeLessThan(1e-3);
  expect(errorOf(await out(small, use(1.5, -0.5)), once)).toBeLessThan(2e-3);
  const away = await out(small, use(-1));
  expect(errorOf(away, base)).toBeGreaterThan(errorOf(once, base) / 4);
  const order = [styles['out.stack']!, [...styles['out.stack']!].reverse()];
  const [forth, back] = [await out(small, { loras: order[0] }), await out(small, { loras: order[1] })];
  expect(errorOf(forth, back)).toBeLessThan(1e-3);
  expect((await forward(small, use(...Array(40).fill(0.01)))).ok).toBe(true);
});

test('a strength that is no finite number is answered ERR_BAD_STRENGTH', async () => {
  for (const strength of [Number.NaN, null, undefined, '1', true, [1]]) {
    await expectError(small, { loras: [{ lora: 'ink.safetensors', strength }] }, 'ERR_BAD_STRENGTH');
  }
  const { error } = await forward(small, { loras: [{ lora: 'zz.safetensors', strength: 1 }] });
  expect(error!.code).toBe('ERR_UNKNOWN_LORA');
});

test('wrong fields of a forward are refused', async () => {
  await expectError(small, { surprise: 1 }, 'ERR_BAD_REQUEST');
  for (const loras of [
    null,
    {},
    'ink.safetensors',
    ['ink.safetensors'],
    [null],
    [{ strength: 1 }],
    [{ lora: 3, strength: 1 }],
  ]) {
    await expectError(small, { loras }, 'ERR_BAD_REQUEST');
  }
  await expectError(
    small,
    { loras: [{ lora: 'ink.safetensors', strength: 1, surprise: 1 }] },
    'ERR_BAD_REQUEST',
  );
  for (const model of [undefined, null, 3, '', `../models/${MODEL}`])
    await expectError(small, { model }, 'ERR_BAD_REQUEST');
  await expectError(small, { model: 'zz.safetensors' }, 'ERR_UNKNOWN_MODEL');
  await expectError(small, { model: `sha256:${'0'.repeat(64)}` }, 'ERR_UNKNOWN_MODEL');
});

test('missing, unexpected, misshapen and mistyped tensors each have their error', async () => {
  for (const name of small.keys()) await expectError(changed({ [name]: null }), {}, 'ERR_MISSING_TENSOR');
  for (const name of [
    'y',
    'z',
    'out',
    'control',
    'control.input',
    'control.input.',
    'control.side.0',
    'control.input.-1',
    'control.input.x',
  ]) {
    await expectError(changed({ [name]: f32([1, 4], noise(4)) }), {}, 'ERR_UNEXPECTED_TENSOR');
  }
  const shapes: readonly [string, readonly number[]][] = [
    ['x', [3, 8, 8]],
    ['x', [1, 4, 8, 8]],
    ['x', [1, 3, 8, 8, 1]],
    ['x', [1, 3, 0, 8]],
    ['x', [0, 3, 8, 8]],
    ['x', []],
    ['timesteps', []],
    ['timesteps', [2]],
    ['timesteps', [1, 1]],
    ['context', [1, 4, 63]],
    ['context', [2, 4, 64]],
    ['context', [1, 0, 64]],
    ['context', [4, 64]],
  ];
  for (const [name, shape] of shapes) {
    const tensor = f32(shape, noise(shape.reduce((a, b) => a * b, 1)));
    await expectError(changed({ [name]: tensor }), {}, 'ERR_BAD_SHAPE');
  }
  await expectError(changed({ timesteps: f16([1], [500]) }), {}, 'ERR_BAD_DTYPE');
  for (const dtype of ['BF16', 'I16', 'U16']) {
    for (const name of ['x', 'context']) {
      const { shape } = small.get(name)!;
      const data = new Uint8Array(2 * shape.reduce((a, b) => a * b, 1));
      await expectError(changed({ [name]: { dtype, shape, data } }), {}, 'ERR_BAD_DTYPE');
    }
  }
});

test('any height, width and number of context tokens is taken', async () => {
  for (const [h, w, t] of [
    [1, 1, 1],
    [7, 13, 2],
    [8, 5, 77],
    [16, 8, 80],
  ] as const) {
    const result = await out(
      changed({ x: f32([1, 3, h, w], noise(3 * h * w)), context: f32([1, t, 64], noise(t * 64)) }),
    );
    expect(result.shape).toEqual([1, 3, h, w]);
    expect(errorOf(result, result)).toBe(0);
  }
});
