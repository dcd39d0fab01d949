/**
 * Rung `software`: files that the engine must not load, as models and as LoRAs. Each is one error with its code, what,
 * where and the cure; afterwards the same engine gives the right result for a good request.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import { type Dtype, decode, encode, type TensorView } from '../../src/safetensors.ts';
import { readFixture } from '../fixtures/fixture.ts';
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

/** A file made of another one's bytes. */
function altered(
  from: { path: string },
  change: (bytes: Buffer) => Uint8Array,
): { name: string; path: string; version: string } {
  const source = sourceOf(folder, 'bad');
  writeFileSync(source.path, change(readFileSync(from.path)));
  return source;
}

/** A file made of another one's tensors. */
const edited = (from: { path: string }, change: (tensor: TensorView) => TensorView | null) =>
  altered(from, (bytes) =>
    encode([...decode(bytes).tensors.values()].flatMap((tensor) => change(tensor) ?? [])),
  );

const named = (names: Readonly<Record<string, readonly number[]>>, dtype: Dtype = 'U8') =>
  altered(model, () =>
    encode(
      Object.entries(names).map(([name, shape]) => ({
        name,
        dtype,
        shape,
        data: new Uint8Array(shape.reduce((a, b) => a * b, 1)),
      })),
    ),
  );

const loading = (source: { name: string; path: string; version: string }) =>
  failureOf(engine.loadModel(source, 'f32'));
const adding = (source: { name: string; path: string; version: string }) =>
  failureOf(engine.loadAdapter(source, 'sd1'));

/** The header of a file with one text in place of another of the same length. */
const lying = (bytes: Buffer, from: string, to: string): Buffer => {
  const at = bytes.indexOf(from);
  if (at < 0 || from.length !== to.length) throw new Error(`cannot put ${to} for ${from}`);
  const copy = Buffer.from(bytes);
  copy.write(to, at);
  return copy;
};

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
    const error = await loading(named(tensors));
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
    const bad = named({ 'first_stage_model.decoder.conv_in.weight': [1] });
    expect(await loading({ ...bad, name: 'sd1', version: '2' })).toMatchObject({ code: 'ERR_MODEL_INVALID' });
  });

  test('when a storage is asked for that does not exist', async () => {
    const error = await failureOf(engine.loadModel({ ...model, name: 'other' }, 'int8' as 'f16'));
    expect(error).toMatchObject({
      code: 'ERR_BAD_DTYPE',
      message: 'Storage "int8" is not supported; ask for f32, f16 or auto',
    });
  });
});

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
    const error = await adding(named({ 'lora_unet_double_blocks_0_img_attn_proj.lora_down.weight': [4] }));
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
    const error = await adding(named({ [`lora_unet_${TO_Q.replaceAll('.', '_')}.hada_w1_a`]: [4] }));
    expect(error).toMatchObject({ code: 'ERR_LORA_UNSUPPORTED' });
    expect(error.message).toContain(`a LoHa adapter of ${TO_Q}; applied are: LoRA`);
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
