/**
 * Rung `software`: everything a caller can send that the engine must not take. Each is one error with its code, what,
 * where, both values and the cure; afterwards the same engine gives the right result for a good request.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { StepRequest, TensorData } from '../../src/engine/types.ts';
import type { ErrorCode, UnetdError } from '../../src/errors.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { failureOf, loraFile, modelFile, rowsOfCase, run, stack, temporaryFolder } from './setting.ts';

const [folder, remove] = temporaryFolder();
const fixture = readFixture('sd1');
const xl = readFixture('sdxl');
const good = { ...rowsOfCase(fixture, 'base')[0]!, loras: stack(['style', 0.5]) };
const goodXl = rowsOfCase(xl, 'base')[0]!;
const withControl = rowsOfCase(fixture, 'control')[0]!;
let engine: Engine;
let right: Float32Array;

beforeAll(async () => {
  engine = await Engine.create({ maxBatch: 8 });
  await engine.loadModel(modelFile(folder, fixture, 'sd1'), 'f32');
  await engine.loadModel(modelFile(folder, xl, 'sdxl'), 'f32');
  await engine.loadModel(modelFile(folder, readFixture('sd1-inpaint'), 'inpaint'), 'f32');
  await engine.loadAdapter(loraFile(folder, fixture, 'style'), 'sd1');
  right = await run(engine, 'sd1', [good]);
});
afterEach(async () => {
  expect(await run(engine, 'sd1', [good]), 'a good request after the refusal').toEqual(right);
});
afterAll(async () => {
  await engine.close();
  remove();
});

const zeros = (shape: readonly number[], dtype: 'F32' | 'F16' = 'F32'): TensorData => ({
  dtype,
  shape,
  data: new Uint8Array(shape.reduce((a, b) => a * b, dtype === 'F32' ? 4 : 2)),
});

/** A tensor of a dtype that no request may have; the types forbid it, a client does not. */
const strange = (shape: readonly number[], dtype: string): TensorData =>
  ({ ...zeros(shape, 'F16'), dtype }) as unknown as TensorData;

const refusal = (model: string, ...requests: readonly StepRequest[]): Promise<UnetdError> =>
  failureOf(engine.forward({ model, requests }));

type Row = readonly [what: string, change: Partial<StepRequest>, code: ErrorCode, message: string];

const ROWS: readonly Row[] = [
  [
    'a LoRA that is not loaded',
    { loras: stack(['style', 1], ['absent', 1]) },
    'ERR_UNKNOWN_LORA',
    'LoRA "absent" is not loaded; load it first',
  ],
  [
    'a strength that is not a number',
    { loras: stack(['style', Number.NaN]) },
    'ERR_BAD_STRENGTH',
    'LoRA "style" has strength NaN; send a finite number.',
  ],
  [
    'an infinite strength',
    { loras: stack(['style', Number.POSITIVE_INFINITY]) },
    'ERR_BAD_STRENGTH',
    'LoRA "style" has strength Infinity; send a finite number.',
  ],
  [
    'x of three dimensions',
    { x: zeros([4, 8, 8]) },
    'ERR_BAD_SHAPE',
    'Tensor "x" has shape [4, 8, 8], model "sd1" takes [N, 4, H, W]: use a latent made for this model.',
  ],
  [
    'x with the channels of an inpainting model',
    { x: zeros([1, 9, 8, 8]) },
    'ERR_BAD_SHAPE',
    'Tensor "x" has shape [1, 9, 8, 8], model "sd1" takes [N, 4, H, W]: use a latent made for this model.',
  ],
  [
    'x without a pixel',
    { x: zeros([1, 4, 0, 8]) },
    'ERR_BAD_SHAPE',
    'Tensor "x" has shape [1, 4, 0, 8], model "sd1" takes [N, 4, H, W]: no size may be 0.',
  ],
  [
    'x as BF16',
    { x: strange([1, 4, 8, 8], 'BF16') },
    'ERR_BAD_DTYPE',
    'Tensor "x" has dtype BF16, expected F32 or F16; convert it before sending.',
  ],
  [
    'x with fewer bytes than its shape needs',
    { x: { ...zeros([1, 4, 8, 7]), shape: [1, 4, 8, 8] } },
    'ERR_BAD_SHAPE',
    'Tensor "x" of shape [1, 4, 8, 8] and dtype F32 needs 1024 bytes, got 896; send all of it, or the shape it has.',
  ],
  [
    'timesteps for another number of images',
    { timesteps: zeros([2]) },
    'ERR_BAD_SHAPE',
    'Tensor "timesteps" has shape [2], model "sd1" takes [1]: send one timestep per image of x.',
  ],
  [
    'timesteps as F16',
    { timesteps: zeros([1], 'F16') },
    'ERR_BAD_DTYPE',
    'Tensor "timesteps" has dtype F16, expected F32; convert it before sending.',
  ],
  [
    'the context of another architecture',
    { context: zeros([1, 13, 64]) },
    'ERR_BAD_SHAPE',
    'Tensor "context" has shape [1, 13, 64], model "sd1" takes [1, T, 48]: encode the prompt with the text encoder that belongs to this model.',
  ],
  [
    'context for another number of images',
    { context: zeros([2, 13, 48]) },
    'ERR_BAD_SHAPE',
    'Tensor "context" has shape [2, 13, 48], model "sd1" takes [1, T, 48]: send one conditioning per image of x.',
  ],
  [
    'context without tokens',
    { context: zeros([1, 0, 48]) },
    'ERR_BAD_SHAPE',
    'Tensor "context" has shape [1, 0, 48], model "sd1" takes [1, T, 48]: send at least one token.',
  ],
  [
    'context as I8',
    { context: strange([1, 13, 48], 'I8') },
    'ERR_BAD_DTYPE',
    'Tensor "context" has dtype I8, expected F32 or F16; convert it before sending.',
  ],
  [
    'y that the model has no use for',
    { y: zeros([1, 96]) },
    'ERR_UNEXPECTED_TENSOR',
    'Model "sd1" has no label embedding, but the request holds "y" of shape [1, 96]; leave y out.',
  ],
  [
    'a control residual of another size',
    { ...withControl, control: { middle: [zeros([1, 128, 2, 2])] } },
    'ERR_BAD_SHAPE',
    'Tensor "control.middle.0" has shape [1, 128, 2, 2], model "sd1" takes [1, 128, 1, 1]: it belongs to middle block 0',
  ],
  [
    'more control residuals than blocks',
    { ...withControl, control: { output: Array.from({ length: 13 }, () => zeros([1, 128, 1, 1])) } },
    'ERR_UNEXPECTED_TENSOR',
    'Tensor "control.output.0" would belong to output block 12, but model "sd1" has 12',
  ],
  [
    'a control residual as F64',
    { ...withControl, control: { middle: [strange([1, 128, 1, 1], 'F64')] } },
    'ERR_BAD_DTYPE',
    'Tensor "control.middle.0" has dtype F64, expected F32 or F16; convert it before sending.',
  ],
];

describe('a forward is refused (software)', () => {
  test.each(ROWS)('for %s', async (_what, change, code, message) => {
    const error = await refusal('sd1', { ...good, ...change });
    expect(error.message).toContain(message);
    expect(error.code).toBe(code);
  });

  test('for a model that is not loaded', async () => {
    const error = await refusal('absent', good);
    expect(error).toMatchObject({
      code: 'ERR_MODEL_NOT_LOADED',
      message: 'Model "absent" is not loaded; load it first',
    });
  });

  test('for y that is missing, or of another width', async () => {
    const { y: _, ...without } = goodXl;
    expect(await refusal('sdxl', without)).toMatchObject({
      code: 'ERR_MISSING_TENSOR',
      message:
        'Model "sdxl" needs the vector conditioning "y" of shape [1, 96], and the request has none; send it as F32 or F16.',
    });
    expect(await refusal('sdxl', { ...goodXl, y: zeros([1, 95]) })).toMatchObject({
      code: 'ERR_BAD_SHAPE',
      message:
        'Tensor "y" has shape [1, 95], model "sdxl" takes [1, 96]: make it with the conditioning that belongs to this model.',
    });
    expect(await refusal('sdxl', { ...goodXl, y: strange([1, 96], 'U8') })).toMatchObject({
      code: 'ERR_BAD_DTYPE',
    });
  });

  test('for a plain latent on an inpainting model, which says what is missing', async () => {
    const error = await refusal('inpaint', { ...good, loras: [] });
    expect(error.code).toBe('ERR_BAD_SHAPE');
    expect(error.message).toContain('[1, 4, 8, 8], model "inpaint" takes [N, 9, H, W]');
    expect(error.message).toContain('send x with c_concat behind its channels');
  });

  test('for requests of two shapes in one batch', async () => {
    const other = rowsOfCase(fixture, 'odd')[0]!;
    const error = await refusal('sd1', good, other);
    expect(error.code).toBe('ERR_BAD_REQUEST');
    expect(error.message).toMatch(
      /^Requests 0 and 1 of the batch cannot run as one forward: .* send them apart/,
    );
  });

  test('for a batch without requests, or of more images than the engine takes', async () => {
    expect(await refusal('sd1')).toMatchObject({ code: 'ERR_BAD_REQUEST' });
    const nine = Array.from({ length: 9 }, () => good);
    expect(await refusal('sd1', ...nine)).toMatchObject({
      code: 'ERR_TOO_LARGE',
      message: 'The batch holds 9 images, this engine takes at most 8; send fewer per request',
    });
  });
});
