/**
 * Rung `software`: files that the engine must not load as LoRAs. Each is one error with its code, what, where and the
 * cure; afterwards the same engine gives the right result for a good request.
 */
import { readFileSync } from 'node:fs';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { FileSource } from '../../src/engine/types.ts';
import { decode } from '../../src/safetensors.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { altered, edited, lying, named } from './bad-files.ts';
import { failureOf, loraFile, modelFile, rowsOfCase, run, stack, temporaryFolder } from './setting.ts';

const [folder, remove] = temporaryFolder();
const fixture = readFixture('sd1');
const model = modelFile(folder, fixture, 'sd1');
const style = loraFile(folder, fixture, 'style');
const good = { ...rowsOfCase(fixture, 'base')[0]!, loras: stack(['style', 0.5]) };
const TO_Q = 'input_blocks.1.1.transformer_blocks.0.attn1.to_q';
let engine: Engine;
let right: Float32Array;

beforeAll(async () => {
  engine = await Engine.create();
  await engine.loadModel(model, 'f32');
  await engine.loadAdapter(style, 'sd1');
  right = await run(engine, 'sd1', [good]);
});
afterEach(async () => {
  expect(await run(engine, 'sd1', [good]), 'a good request after the refusal').toEqual(right);
  expect((await engine.stats()).models.map(({ model: name }) => name)).toEqual(['sd1']);
});
afterAll(async () => {
  await engine.close();
  remove();
});

const adding = (source: FileSource) => failureOf(engine.loadAdapter(source, 'sd1'));

describe('a LoRA file is refused (software)', () => {
  test('that was trained for another architecture, with both shapes and where', async () => {
    const xl = loraFile(folder, readFixture('sdxl'), 'style', 'xl');
    const error = await adding(xl);
    expect(error.code).toBe('ERR_LORA_MISMATCH');
    expect(error.message).toMatch(
      /^Cannot bind "(down|up)" of adapter "xl" to (input|middle|output)_block\S+: expected \[[\d, ]+\], got \[[\d, ]+\]; this adapter was trained for a UNet with context width 64, the open model is a UNet with context width 48/,
    );
  });

  test('that names no layer of the model', async () => {
    const error = await adding(
      named(folder, { 'lora_unet_double_blocks_0_img_attn_proj.lora_down.weight': [4] }),
    );
    expect(error.code).toBe('ERR_LORA_MISMATCH');
    expect(error.message).toMatch(
      /^No key of adapter "bad" names a layer of the open model, .*: it was trained for Flux/,
    );
  });

  test('that is no LoRA but a model', async () => {
    const error = await adding({ ...model, name: 'checkpoint' });
    expect(error.code).toBe('ERR_LORA_MISMATCH');
    expect(error.message).toContain('No key of adapter "checkpoint" names a layer of the open model');
  });

  test('that lacks a matrix, or whose matrices do not fit each other', async () => {
    const first = [...decode(readFileSync(style.path)).tensors.keys()].find((key) =>
      key.endsWith('lora_up.weight'),
    )!;
    const absent = await adding(edited(style, (tensor) => (tensor.name === first ? null : tensor)));
    expect(absent).toMatchObject({ code: 'ERR_LORA_INVALID' });
    expect(absent.message).toMatch(/Adapter "bad" is malformed at .*: it has .*, but no matching "up"/);
    const rank = await adding(
      edited(style, (tensor) =>
        tensor.name === first
          ? {
              ...tensor,
              shape: [tensor.shape[0]!, 5, ...tensor.shape.slice(2)],
              data: new Uint8Array(tensor.shape[0]! * 10),
            }
          : tensor,
      ),
    );
    expect(rank).toMatchObject({ code: 'ERR_LORA_INVALID' });
    expect(rank.message).toMatch(/"up" \[\d+, 5.*\] takes rank 5, "down" gives rank 4/);
  });

  test('whose numbers are not finite, before they reach an image', async () => {
    const nan = await adding(
      edited(style, (tensor) =>
        tensor.name.endsWith('lora_up.weight')
          ? { ...tensor, data: new Uint8Array(tensor.data.byteLength).fill(0xff) }
          : tensor,
      ),
    );
    expect(nan).toMatchObject({ code: 'ERR_LORA_INVALID' });
    expect(nan.message).toMatch(/its element 0 is NaN/);
  });

  test('of a kind that is not applied', async () => {
    const error = await adding(named(folder, { [`lora_unet_${TO_Q.replaceAll('.', '_')}.ia3_l`]: [4] }));
    expect(error).toMatchObject({ code: 'ERR_LORA_UNSUPPORTED' });
    expect(error.message).toContain(`for ${TO_Q}, of the kind IA3; applied are: LoRA`);
  });

  test('that is truncated or lies, and that is a pickle', async () => {
    expect(await adding(altered(style, (bytes) => bytes.subarray(0, bytes.length - 10)))).toMatchObject({
      code: 'ERR_SAFETENSORS',
      message: expect.stringContaining('the file is truncated'),
    });
    const lie = await adding(altered(style, (bytes) => lying(bytes, '"shape":[4,32', '"shape":[5,32')));
    expect(lie).toMatchObject({ code: 'ERR_SAFETENSORS', message: expect.stringContaining('data_offsets') });
    const pickle = await adding({ name: 'old.ckpt', path: '/nowhere/old.ckpt', version: '1' });
    expect(pickle).toMatchObject({ code: 'ERR_LORA_UNSUPPORTED' });
    expect(pickle.message).toContain('never opened; convert the LoRA to .safetensors');
  });

  test('for a model that is not loaded', async () => {
    expect(await failureOf(engine.loadAdapter(style, 'absent'))).toMatchObject({
      code: 'ERR_MODEL_NOT_LOADED',
      message: 'Model "absent" is not loaded; load it first',
    });
  });

  test('in the place of a loaded one, which stays', async () => {
    const bad = altered(style, (bytes) => bytes.subarray(0, 100));
    expect(await adding({ ...bad, name: 'style', version: '2' })).toMatchObject({ code: 'ERR_SAFETENSORS' });
  });
});
