/**
 * Rung `software`: files that the engine must not load as models. Each is one error with its code, what, where and the
 * cure; afterwards the same engine gives the right result for a good request.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { FileSource } from '../../src/engine/types.ts';
import { type Dtype, decode, encode } from '../../src/safetensors.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { altered, edited, lying, named } from './bad-files.ts';
import {
  failureOf,
  loraFile,
  modelFile,
  rowsOfCase,
  run,
  sourceOf,
  stack,
  temporaryFolder,
} from './setting.ts';

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

const loading = (source: FileSource) => failureOf(engine.loadModel(source, 'f32'));

describe('a model file is refused (software)', () => {
  test.each<[string, Readonly<Record<string, readonly number[]>>, string]>([
    [
      'a VAE',
      { 'first_stage_model.decoder.conv_in.weight': [1], 'first_stage_model.encoder.conv_in.weight': [1] },
      'It looks like a VAE.',
    ],
    [
      'a LoRA',
      { [`lora_unet_${TO_Q.replaceAll('.', '_')}.lora_down.weight`]: [1] },
      'It looks like a LoRA adapter.',
    ],
    [
      'a DiT',
      { 'model.diffusion_model.double_blocks.0.img_attn.qkv.weight': [1] },
      'It looks like a DiT (Flux).',
    ],
    ['a ControlNet', { 'control_model.input_hint_block.0.weight': [1] }, 'It looks like a ControlNet.'],
    [
      'a text encoder',
      { 'text_model.encoder.layers.0.mlp.fc1.weight': [1] },
      'It looks like a text encoder.',
    ],
  ])('that is %s, which the message guesses', async (_what, tensors, guess) => {
    const error = await loading(named(folder, tensors));
    expect(error.code).toBe('ERR_MODEL_INVALID');
    expect(error.message).toMatch(
      /^Cannot load model "bad": The file is no UNet this program knows: it has neither/,
    );
    expect(error.message).toContain(guess);
    expect(error.message).toContain('Give a UNet of SD 1.x, SD 2.x or SDXL.');
  });

  test('that lacks tensors, with their number and the first names', async () => {
    const error = await loading(
      edited(model, (tensor) => (tensor.name.endsWith('attn1.to_v.weight') ? null : tensor)),
    );
    expect(error.code).toBe('ERR_MODEL_INVALID');
    expect(error.message).toMatch(
      /^Cannot load model "bad": The UNet is incomplete: of the 686 tensors it needs 16 are missing: .*attn1\.to_v\.weight.* and 11 more; download or convert the file again$/,
    );
  });

  test('that holds a tensor of another shape, with both shapes', async () => {
    const name = `model.diffusion_model.${TO_Q}.weight`;
    const error = await loading(
      edited(model, (tensor) =>
        tensor.name === name ? { ...tensor, shape: [64, 32], data: new Uint8Array(64 * 32 * 2) } : tensor,
      ),
    );
    expect(error.code).toBe('ERR_MODEL_INVALID');
    expect(error.message).toContain(`${TO_Q}.weight: expected [32, 32], got [64, 32]`);
  });

  test.each<[Dtype, number]>([
    ['F8_E4M3', 1],
    ['I8', 1],
    ['F64', 8],
  ])('whose weights are %s, which it says with a cure', async (dtype, width) => {
    const error = await loading(
      edited(model, (tensor) =>
        tensor.shape.length > 1
          ? { ...tensor, dtype, data: new Uint8Array((tensor.data.byteLength / 2) * width) }
          : tensor,
      ),
    );
    expect(error.code).toBe('ERR_MODEL_INVALID');
    expect(error.message).toMatch(
      new RegExp(
        `^Cannot load model "bad": Tensor model\\.diffusion_model\\..* has dtype ${dtype} \\(and \\d+ more tensors like it\\); weights are taken as F32, F16, BF16: convert the file to F16$`,
      ),
    );
  });

  test('whose biases alone are of a dtype that is not taken', async () => {
    const error = await loading(
      edited(model, (tensor) =>
        tensor.name.endsWith('time_embed.0.bias') ? { ...tensor, dtype: 'I16' } : tensor,
      ),
    );
    expect(error.message).toContain('Tensor model.diffusion_model.time_embed.0.bias has dtype I16;');
  });

  test('that is scaled FP8, though every tensor is there', async () => {
    const error = await loading(
      altered(model, (bytes) =>
        encode([
          ...decode(bytes).tensors.values(),
          {
            name: `model.diffusion_model.${TO_Q}.scale_weight`,
            dtype: 'F32',
            shape: [],
            data: new Uint8Array(4),
          },
        ]),
      ),
    );
    expect(error).toMatchObject({ code: 'ERR_MODEL_INVALID' });
    expect(error.message).toContain('scaled or quantised weights');
  });

  test('that is truncated, empty, absent or a pickle', async () => {
    const cases: readonly (readonly [(bytes: Buffer) => Uint8Array, RegExp])[] = [
      [
        (bytes) => bytes.subarray(0, bytes.length - 1000),
        /ends at byte \d+ of the file, which has \d+: the file is truncated/,
      ],
      [(bytes) => bytes.subarray(0, 5000), /the header ends at byte \d+, the file at 5000: it is truncated/],
      [() => new Uint8Array(0), /it has 0 bytes, and the header's length alone takes 8/],
      [
        () => Buffer.from('PK\u0003\u0004 and so on, as torch.save writes'),
        /this is a PyTorch pickle, which could run code/,
      ],
    ];
    for (const [change, message] of cases) {
      const error = await loading(altered(model, change));
      expect(error).toMatchObject({ code: 'ERR_SAFETENSORS', details: { file: 'bad.safetensors' } });
      expect(error.message).toMatch(message);
    }
    const error = await loading(sourceOf(folder, 'absent'));
    expect(error.message).toBe('Bad safetensors file "absent.safetensors": it cannot be opened (ENOENT)');
  });

  test('whose header lies about a shape or an offset', async () => {
    const shape = await loading(
      altered(model, (bytes) => lying(bytes, '"shape":[128,32]', '"shape":[128,33]')),
    );
    expect(shape.code).toBe('ERR_SAFETENSORS');
    expect(shape.message).toMatch(/F16 \[128,33\] takes 8448 bytes, data_offsets \[.*\] hold 8192/);
    const offset = await loading(
      altered(model, (bytes) => lying(bytes, '"data_offsets":[0,', '"data_offsets":[2,')),
    );
    expect(offset.code).toBe('ERR_SAFETENSORS');
  });

  test('in the place of a loaded model, which stays', async () => {
    const bad = named(folder, { 'first_stage_model.decoder.conv_in.weight': [1] });
    expect(await loading({ ...bad, name: 'sd1', version: '2' })).toMatchObject({ code: 'ERR_MODEL_INVALID' });
  });

  test('when a storage is asked for that does not exist', async () => {
    const error = await failureOf(engine.loadModel({ ...model, name: 'other' }, 'int8' as 'f16'));
    expect(error).toMatchObject({
      code: 'ERR_BAD_DTYPE',
      message: 'Storage "int8" is not supported; ask for one of auto, f32, f16, q8_0',
    });
  });
});
