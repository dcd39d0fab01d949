/** Which forwards fit a model, and what is said of those that do not. */
import { describe, expect, it } from 'vitest';
import { batchKey, checkStep, controlShapes } from '../../src/engine/check.ts';
import type { StepRequest, TensorData } from '../../src/engine/types.ts';
import type { UnetdError } from '../../src/errors.ts';
import { CONFIG, filled } from './setting.ts';

const step = (changes: Partial<StepRequest> = {}): StepRequest => ({
  loras: [],
  x: filled([2, 4, 5, 7]),
  timesteps: filled([2]),
  context: filled([2, 3, 6]),
  ...changes,
});

function refusal(changes: Partial<StepRequest>, config = CONFIG): UnetdError {
  try {
    checkStep(config, step(changes), 'm');
  } catch (error) {
    return error as UnetdError;
  }
  throw new Error('the request was taken');
}

describe('a forward', () => {
  it('passes when everything fits, in F32 and F16', () => {
    expect(checkStep(CONFIG, step(), 'm')).toEqual(step());
    const half = step({ x: filled([2, 4, 5, 7], 0, 'F16'), context: filled([2, 3, 6], 0, 'F16') });
    expect(checkStep(CONFIG, half, 'm')).toEqual(half);
  });

  it.each<[string, Partial<StepRequest>, string, string]>([
    ['x of too few dimensions', { x: filled([4, 5, 7]) }, 'ERR_BAD_SHAPE', '[4, 5, 7]'],
    ['x without images', { x: filled([0, 4, 5, 7]) }, 'ERR_BAD_SHAPE', '[N, 4, H, W]'],
    ['x with other channels', { x: filled([2, 9, 5, 7]) }, 'ERR_BAD_SHAPE', '[2, 9, 5, 7]'],
    ['timesteps for another count', { timesteps: filled([3]) }, 'ERR_BAD_SHAPE', 'one timestep per image'],
    ['timesteps in F16', { timesteps: filled([2], 0, 'F16') }, 'ERR_BAD_DTYPE', 'F16'],
    ['context of another width', { context: filled([2, 3, 8]) }, 'ERR_BAD_SHAPE', '[2, T, 6]'],
    ['context without tokens', { context: filled([2, 0, 6]) }, 'ERR_BAD_SHAPE', '[2, 0, 6]'],
    [
      'context for another count',
      { context: filled([1, 3, 6]) },
      'ERR_BAD_SHAPE',
      'one conditioning per image',
    ],
    ['y that the model has no use for', { y: filled([2, 9]) }, 'ERR_UNEXPECTED_TENSOR', 'leave y out'],
    ['a strength that is NaN', { loras: [{ lora: 'a', strength: Number.NaN }] }, 'ERR_BAD_STRENGTH', 'NaN'],
    [
      'an infinite strength',
      { loras: [{ lora: 'a', strength: Number.NEGATIVE_INFINITY }] },
      'ERR_BAD_STRENGTH',
      '-Infinity',
    ],
  ])('is refused for %s', (_what, changes, code, words) => {
    const error = refusal(changes);
    expect(error.code).toBe(code);
    expect(error.message).toContain(words);
  });

  it('is refused for another dtype and for bytes that do not fit the shape', () => {
    const strange = { ...filled([2, 4, 5, 7]), dtype: 'BF16' } as unknown as TensorData;
    expect(refusal({ x: strange }).code).toBe('ERR_BAD_DTYPE');
    expect(refusal({ x: { ...filled([1, 4, 5, 7]), shape: [2, 4, 5, 7] } }).code).toBe('ERR_BAD_SHAPE');
  });

  it('needs y where the model has a label embedding', () => {
    const config = { ...CONFIG, admChannels: 9 };
    expect(refusal({}, config)).toMatchObject({ code: 'ERR_MISSING_TENSOR' });
    expect(refusal({ y: filled([2, 8]) }, config)).toMatchObject({ code: 'ERR_BAD_SHAPE' });
    expect(checkStep(config, step({ y: filled([2, 9]) }), 'm').y?.shape).toEqual([2, 9]);
  });

  it('is told of concatenated input where the model takes more channels', () => {
    const error = refusal({}, { ...CONFIG, inChannels: 9 });
    expect(error.message).toContain('c_concat');
  });
});

describe('control residuals', () => {
  const full: TensorData = filled([2, 8, 5, 7]);
  const halved: TensorData = filled([2, 8, 3, 4]);
  const deep: TensorData = filled([2, 16, 3, 4]);

  it('have the shapes of the blocks, odd sizes rounded up', () => {
    expect(controlShapes(CONFIG, 5, 7)).toEqual({
      input: [
        [8, 5, 7],
        [8, 3, 4],
        [16, 3, 4],
      ],
      middle: [[16, 3, 4]],
      output: [
        [16, 3, 4],
        [8, 3, 4],
        [8, 5, 7],
      ],
    });
  });

  it('belong to the blocks from the end of the list on', () => {
    const control = { input: [deep, halved, full], middle: [deep], output: [full, halved, deep] };
    expect(checkStep(CONFIG, step({ control }), 'm').control).toEqual(control);
  });

  it('are brought to one entry per block', () => {
    const long = step({ control: { input: [null, null, halved, null], output: [deep] } });
    expect(checkStep(CONFIG, long, 'm').control).toEqual({
      input: [null, halved, null],
      output: [null, null, deep],
    });
    expect(checkStep(CONFIG, step({ control: { input: [null], middle: [] } }), 'm').control).toBeUndefined();
  });

  it('are refused with the block they would belong to', () => {
    expect(refusal({ control: { input: [full, halved, deep] } })).toMatchObject({
      code: 'ERR_BAD_SHAPE',
      message: expect.stringContaining('input block 2'),
    });
    expect(refusal({ control: { input: [deep, deep, halved, full] } })).toMatchObject({
      code: 'ERR_UNEXPECTED_TENSOR',
      message: expect.stringContaining('input block 3'),
    });
  });
});

describe('the batch key', () => {
  it('ignores LoRAs, timesteps, images and dtypes', () => {
    const other = step({
      loras: [{ lora: 'a', strength: 1 }],
      x: filled([1, 4, 5, 7], 3, 'F16'),
      timesteps: filled([1], 5),
      context: filled([1, 3, 6], 1, 'F16'),
    });
    expect(batchKey(other)).toBe(batchKey(step()));
  });

  it('tells sizes, context lengths, y and control patterns apart', () => {
    const control = { middle: [filled([2, 16, 3, 4])] };
    const keys = [
      step(),
      step({ x: filled([2, 4, 7, 5]) }),
      step({ context: filled([2, 4, 6]) }),
      step({ y: filled([2, 9]) }),
      step({ control }),
      step({ control: { input: [null, null, filled([2, 8, 5, 7])] } }),
      step({ control: { input: [filled([2, 16, 3, 4]), null, null] } }),
    ].map(batchKey);
    expect(new Set(keys).size).toBe(keys.length);
  });
});
