/**
 * Control residuals: which block an entry of a list belongs to, and what it is added to.
 * There is no reference of ControlNets here: a residual that is constant per channel equals a changed bias of the layer that
 * ends the block, so edited models are uploaded and compared with the control of the original.
 */
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Client, Fields } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { digestOf, errorOf, f16, f32, readTensors, type Tensor, type Tensors, valuesOf } from './tensors.ts';

const PREFIX = 'model.diffusion_model.';
const file = readTensors(`${ASSETS}models/${MODEL}`).tensors;
/** At f32, what stands in two places differs by rounding alone. */
const SAME = 2e-5;
/** Height and width behind each input block, for x of 6x10: halved, rounding up, at blocks 2 and 4. */
const SIZES = [
  [6, 10],
  [6, 10],
  [3, 5],
  [3, 5],
  [2, 3],
  [2, 3],
] as const;
const noise = (count: number, seed = 1): number[] =>
  Array.from({ length: count }, (_, i) => Math.sin((i + seed) * 12.9898));
const inputs: Tensors = new Map([
  ['x', f32([1, 3, 6, 10], noise(180))],
  ['timesteps', f32([1], [300])],
  ['context', f32([1, 4, 64], noise(256))],
]);
/** Per channel, exact in F16. */
const delta = Array.from({ length: 64 }, (_, c) => ((c % 5) - 2) / 2);
let server: Server;
let client: Client;
let base: Tensor;

beforeAll(async () => {
  server = await serve('--dtype', 'f32');
  client = await server.open();
  base = await out({});
  await client.close();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  client = await server.open();
});
afterEach(async () => {
  expect(await client.finish()).toEqual([]);
});

async function run(control: Readonly<Record<string, Tensor>>, fields: Fields = {}) {
  const tensors = new Map(inputs);
  for (const [at, tensor] of Object.entries(control)) tensors.set(`control.${at}`, tensor);
  return await client.send('forward', { model: MODEL, ...fields }, tensors);
}

async function out(control: Readonly<Record<string, Tensor>>, fields: Fields = {}): Promise<Tensor> {
  const answer = await run(control, fields);
  expect(answer.error).toBeUndefined();
  return answer.tensors!.get('out')!;
}

async function codeOf(
  control: Readonly<Record<string, Tensor>>,
  fields: Fields = {},
): Promise<string | undefined> {
  return (await run(control, fields)).error?.code;
}

/** A residual for what leaves input block b, by channel or different in every place. */
function residual(block: number, of: (channel: number, i: number) => number): Tensor {
  const [h, w] = SIZES[block]!;
  return f32(
    [1, 64, h, w],
    Array.from({ length: 64 * h * w }, (_, i) => of(Math.floor(i / (h * w)), i)),
  );
}
const constant = (block: number): Tensor => residual(block, (channel) => delta[channel]!);
const varied = (block: number): Tensor => residual(block, (_, i) => Math.sin(i * 7.7));

/** Uploads the demo model with some tensors changed, and gives its name. */
async function upload(
  edits: Readonly<Record<string, (value: number, i: number) => number>>,
): Promise<string> {
  const tensors = new Map(file);
  for (const [name, edit] of Object.entries(edits)) {
    const tensor = tensors.get(PREFIX + name)!;
    const { shape } = tensor;
    // As F32, so that a sum with the bias is not rounded to F16.
    tensors.set(PREFIX + name, f32(shape, valuesOf(tensor).map(edit)));
  }
  const digest = digestOf(tensors);
  expect((await client.send('model.put', { digest }, tensors)).result).toEqual({ digest, complete: true });
  return `sha256:${digest}`;
}

test('an entry of input changes what its block gives, before it is used as a skip', async () => {
  const ends = [
    '0.0.bias',
    '1.0.out_layers.3.bias',
    '2.0.op.bias',
    '3.1.proj_out.bias',
    '4.0.op.bias',
    '5.1.proj_out.bias',
  ];
  for (const [block, end] of ends.entries()) {
    const model = await upload({ [`input_blocks.${end}`]: (value, i) => value + delta[i]! });
    const expected = await out({}, { model });
    await client.ask('model.unload', { model });
    const actual = await out({ [`input.${5 - block}`]: constant(block) });
    expect(errorOf(actual, expected), `block ${block}`).toBeLessThan(SAME);
    expect(errorOf(base, expected), `block ${block}`).toBeGreaterThan(100 * SAME);
  }
});

test('the entry of middle changes what the middle block gives', async () => {
  const model = await upload({ 'middle_block.2.out_layers.3.bias': (value, i) => value + delta[i]! });
  const expected = await out({}, { model });
  expect(errorOf(await out({ 'middle.0': constant(5) }), expected)).toBeLessThan(SAME);
  expect(errorOf(base, expected)).toBeGreaterThan(100 * SAME);
});

test('an entry of output changes the skip, and not what flows through the middle', async () => {
  // With a middle block that passes its input on, input block 5 goes to the middle's output and to the skip of output block 0.
  const zero = () => 0;
  const parts = ['0.out_layers.3', '1.proj_out', '2.out_layers.3'].flatMap((part) => [
    `${part}.weight`,
    `${part}.bias`,
  ]);
  const model = await upload(Object.fromEntries(parts.map((part) => [`middle_block.${part}`, zero])));
  const both = await out({ 'input.0': varied(5) }, { model });
  const apart = await out({ 'middle.0': varied(5), 'output.5': varied(5) }, { model });
  expect(errorOf(apart, both)).toBeLessThan(SAME);
  for (const control of [{}, { 'middle.0': varied(5) }, { 'output.5': varied(5) }]) {
    expect(errorOf(await out(control, { model }), both), Object.keys(control).join()).toBeGreaterThan(
      100 * SAME,
    );
  }
});

test('an entry of output has the shape of the skip its block takes', async () => {
  for (let block = 0; block < 6; block += 1) {
    // Output block b takes the skip of input block 5 - b; the entry for it stands at 5 - b.
    expect(await codeOf({ [`output.${5 - block}`]: varied(5 - block) })).toBeUndefined();
    const wrong = varied(block < 3 ? 0 : 5);
    expect(await codeOf({ [`output.${5 - block}`]: wrong })).toBe('ERR_BAD_SHAPE');
  }
});

test('a list is counted from its end, by the length that is stated', async () => {
  const expected = await out({ 'input.5': varied(0) });
  expect(errorOf(base, expected)).toBeGreaterThan(100 * SAME);
  expect(errorOf(await out({ 'input.5': varied(0) }, { control: { input: 6 } }), expected)).toBe(0);
  expect(errorOf(await out({ 'input.0': varied(0) }, { control: { input: 1 } }), expected)).toBe(0);
  expect(errorOf(await out({ 'input.3': varied(0) }, { control: { input: 4, output: 2 } }), expected)).toBe(
    0,
  );
  expect(errorOf(await out({ 'input.12': varied(0) }, { control: { input: 13 } }), expected)).toBe(0);
  // Unstated, the length is the highest index plus one where that is more than the blocks.
  expect(errorOf(await out({ 'input.12': varied(0) }), expected)).toBe(0);
});

test('a list that ends in None belongs to later blocks', async () => {
  // A T2I-Adapter's list [r, None, None] and a full list [.., r, None, None] state the same for block 2.
  const expected = await out({ 'input.3': varied(2) });
  expect(errorOf(await out({ 'input.0': varied(2) }, { control: { input: 3 } }), expected)).toBe(0);
  expect(
    errorOf(await out({ 'input.0': varied(2) }, { control: { input: 3, middle: 0, output: 0 } }), expected),
  ).toBe(0);
  expect(await codeOf({ 'input.0': varied(2) }, { control: { input: 1 } })).toBe('ERR_BAD_SHAPE');
});

test('the middle list is counted from its end too', async () => {
  const expected = await out({ 'middle.0': varied(5) });
  expect(errorOf(await out({ 'middle.1': varied(5) }), expected)).toBe(0);
  expect(errorOf(await out({ 'middle.1': varied(5) }, { control: { middle: 2 } }), expected)).toBe(0);
  expect(await codeOf({ 'middle.0': varied(5) }, { control: { middle: 2 } })).toBe('ERR_UNEXPECTED_TENSOR');
});

test('entries with holes between them add up, and lists of None alone change nothing', async () => {
  const all = { 'input.5': varied(0), 'input.2': varied(3), 'output.1': varied(1), 'middle.0': varied(5) };
  const together = await out(all);
  const lengths = { input: 6, middle: 1, output: 6 };
  expect(errorOf(await out(all, { control: lengths }), together)).toBe(0);
  for (const name of Object.keys(all)) {
    const rest = Object.fromEntries(Object.entries(all).filter(([other]) => other !== name));
    expect(errorOf(await out(rest), together), name).toBeGreaterThan(10 * SAME);
  }
  expect(errorOf(await out({}, { control: { input: 100, middle: 0, output: 7 } }), base)).toBe(0);
  const zeros = {
    'input.5': residual(0, () => 0),
    'output.0': residual(0, () => 0),
    'middle.0': residual(5, () => 0),
  };
  expect(errorOf(await out(zeros), base)).toBeLessThan(SAME);
});

test('a residual in F16, kept or batched beside requests without one, gives the same', async () => {
  const tensor = varied(0);
  const expected = await out({ 'input.5': tensor });
  const half = f16(tensor.shape, valuesOf(tensor));
  expect(errorOf(await out({ 'input.5': half }), expected)).toBeLessThan(1e-3);
  await out({ 'input.5': tensor }, { keep: { 'control.input.5': 'r' } });
  expect(errorOf(await out({}, { reuse: { 'control.input.5': 'r' } }), expected)).toBe(0);
  const mixed = [{}, { 'input.5': tensor }, {}, { 'input.5': tensor }, {}];
  const answers = await Promise.all(mixed.map((control) => run(control)));
  expect(Math.max(...answers.map(({ timing }) => timing!.batchedRequests))).toBeGreaterThan(1);
  for (const [i, answer] of answers.entries()) {
    expect(errorOf(answer.tensors!.get('out'), i % 2 ? expected : base), String(i)).toBeLessThan(SAME);
  }
});

test('wrong residuals and lengths are refused', async () => {
  expect(await codeOf({ 'input.0': varied(0) })).toBe('ERR_BAD_SHAPE');
  expect(await codeOf({ 'input.5': f32([1, 63, 6, 10], noise(3780)) })).toBe('ERR_BAD_SHAPE');
  expect(await codeOf({ 'input.5': f32([2, 64, 6, 10], noise(7680)) })).toBe('ERR_BAD_SHAPE');
  expect(
    await codeOf({ 'input.5': { dtype: 'I32', shape: [1, 64, 6, 10], data: new Uint8Array(15_360) } }),
  ).toBe('ERR_BAD_DTYPE');
  expect(await codeOf({ 'input.0': varied(0) }, { control: { input: 7 } })).toBe('ERR_UNEXPECTED_TENSOR');
  expect(await codeOf({ 'output.0': varied(0) }, { control: { output: 9 } })).toBe('ERR_UNEXPECTED_TENSOR');
  expect(await codeOf({ 'input.05': varied(0) })).toBe('ERR_UNEXPECTED_TENSOR');
  expect(await codeOf({ 'input.5': varied(0) }, { control: { input: 5 } })).toBe('ERR_BAD_REQUEST');
  for (const control of [null, [], 6, { input: -1 }, { input: 1.5 }, { input: '6' }, { side: 1 }]) {
    expect(await codeOf({}, { control }), JSON.stringify(control)).toBe('ERR_BAD_REQUEST');
  }
});
