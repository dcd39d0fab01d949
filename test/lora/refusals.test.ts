/** Everything that parsing a LoRA file refuses, and what it says. No GPU. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { fromF32 } from '../../src/half.ts';
import type { TensorView } from '../../src/safetensors.ts';
import { CONV1, CONV3, count, failure, flat, LINEAR, pair, parse, raw, SDXL, tensor } from './files.ts';

const SEED = 0x5eed;

describe('an adapter for another architecture', () => {
  const context = 'input_blocks.4.1.transformer_blocks.0.attn2.to_k';

  it('is refused with both shapes and both architectures', async () => {
    const error = await failure(pair(context, [16, 2048], [640, 16]));
    expect(error.code).toBe('ERR_LORA_MISMATCH');
    expect(error.message).toBe(
      `Cannot bind "down" of adapter "pixel" to ${context}: expected [16, 768], got [16, 2048]; this adapter was trained for SDXL, the open model is SD 1.x`,
    );
    expect(error.details).toMatchObject({
      layer: context,
      part: 'down',
      expected: [16, 768],
      got: [16, 2048],
    });
    const back = await failure(pair(context, [16, 1024], [640, 16]), SDXL);
    expect(back.message).toContain('trained for SD 2.x, the open model is SDXL');
  });

  it('is refused at whichever matrix does not fit', async () => {
    const cases: readonly (readonly [string, number[], number[], string])[] = [
      [
        CONV1,
        [16, 640],
        [320, 16],
        '"down" of adapter "pixel" to input_blocks.1.1.proj_in: expected [16, 320], got [16, 640]',
      ],
      [CONV1, [16, 640, 1, 1], [320, 16, 1, 1], 'expected [16, 320, 1, 1], got [16, 640, 1, 1]'],
      [CONV3, [16, 320, 1, 1], [320, 16, 1, 1], 'expected [16, 320, 3, 3], got [16, 320, 1, 1]'],
      [CONV3, [16, 320], [320, 16], 'expected [16, 320, 3, 3], got [16, 320]'],
      [LINEAR, [16, 320, 3, 3], [320, 16, 1, 1], 'expected [16, 320], got [16, 320, 3, 3]'],
      [
        LINEAR,
        [16, 320],
        [640, 16],
        '"up" of adapter "pixel" to input_blocks.1.1.transformer_blocks.0.attn1.to_q: expected [320, 16], got [640, 16]',
      ],
    ];
    for (const [id, down, up, message] of cases) {
      const error = await failure(pair(id, down, up));
      expect(error.code).toBe('ERR_LORA_MISMATCH');
      expect(error.message).toContain(message);
      expect(error.message).not.toContain('trained for');
    }
    const tucker = [
      ...pair(CONV3, [4, 320], [320, 4]),
      tensor(`${flat(CONV3)}.lora_mid.weight`, [4, 4, 1, 1]),
    ];
    expect((await failure(tucker)).message).toContain(
      '"mid" of adapter "pixel" to input_blocks.1.0.in_layers.2: expected [4, 4, 3, 3]',
    );
    const wide = [...pair(CONV3, [4, 640], [320, 4]), tensor(`${flat(CONV3)}.lora_mid.weight`, [4, 4, 3, 3])];
    expect((await failure(wide)).message).toContain(
      '"down" of adapter "pixel" to input_blocks.1.0.in_layers.2: expected [4, 320, 1, 1]',
    );
  });

  it('is refused where no key names a layer, saying what it looks like', async () => {
    const cases: readonly (readonly [string, RegExp])[] = [
      ['lora_unet_double_blocks_0_img_attn_proj.lora_down.weight', /trained for Flux/],
      ['transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight', /trained for Flux/],
      ['lora_unet_input_blocks_99_1_transformer_blocks_0_attn2_to_k.lora_down.weight', /trained for SDXL/],
      ['lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight', /all its 1 keys are of text encoders/],
      ['model.diffusion_model.out.2.weight', /its keys look like model\.diffusion_model\.out\.2\.weight/],
      ['lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a', /text encoders/],
    ];
    for (const [key, message] of cases) {
      const error = await failure([tensor(key, [4, 2048])]);
      expect(error.code).toBe('ERR_LORA_MISMATCH');
      expect(error.message).toMatch(
        /^No key of adapter "pixel" names a layer of the open model, which is SD 1\.x: /,
      );
      expect(error.message).toMatch(message);
    }
    expect((await failure([])).message).toMatch(/the file is empty/);
  });
});

describe('a malformed adapter', () => {
  const good = pair(LINEAR, [4, 320], [320, 4]);
  const [down, up] = good as [TensorView, TensorView];

  it('is refused with the layer and the fault', async () => {
    const cases: readonly (readonly [readonly TensorView[], RegExp])[] = [
      [[down], /malformed at .*to_q: it has lora_unet_.*lora_down\.weight, but no matching "up"/],
      [[up], /no matching "down"/],
      [[down, tensor(up.name, [320, 5])], /"up" \[320, 5\] takes rank 5, "down" gives rank 4/],
      [pair(LINEAR, [0, 320], [320, 0]), /has the shape \[0, 320\]/],
      [[tensor(down.name, [1280]), up], /has the shape \[1280\], not \[n, m\]/],
      [[tensor(down.name, [4, 320, 1]), up], /has the shape \[4, 320, 1\]/],
      [[tensor(down.name, [4, 320, 1, 3]), up], /has the shape \[4, 320, 1, 3\]/],
      [[down, tensor(up.name, [320, 4, 3, 3])], /3x3 convolution, only 1x1 is known/],
      [[...good, tensor(`${flat(LINEAR)}.lora_mid.weight`, [4, 4])], /"mid" .* not \[r, r, k, k\]/],
      [
        [...good, tensor(`${flat(LINEAR)}.lora_mid.weight`, [4, 5, 1, 1])],
        /"mid" \[4, 5, 1, 1\] takes rank 5, "down" gives rank 4/,
      ],
      [
        [...good, tensor(`${flat(LINEAR)}.lora_mid.weight`, [5, 4, 1, 1])],
        /"up" \[320, 4\] takes rank 4, "mid" gives rank 5/,
      ],
      [
        [...good, tensor(`diffusion_model.${LINEAR}.lora_up.weight`, [320, 4])],
        /both .* and .* are its "up"/,
      ],
      [
        [...good, raw(`${flat(LINEAR)}.alpha`, 'F32', [2], [0, 0, 0, 0, 0, 0, 0, 0])],
        /an alpha is one number/,
      ],
      [[...good, raw(`${flat(LINEAR)}.alpha`, 'F32', [], [0, 0, 0xc0, 0x7f])], /it is NaN/],
      [[...good, raw(`${flat(LINEAR)}.alpha`, 'BOOL', [], [1])], /BOOL, which is no number/],
      [[{ ...down, dtype: 'I32' }, up], /I32, which is no float/],
      [
        [{ ...down, data: fromF32('F32', new Float32Array(1280).fill(Number.NaN, 7, 8)) }, up],
        /its element 7 is NaN/,
      ],
    ];
    for (const [tensors, message] of cases) {
      const error = await failure(tensors);
      expect(error.message).toMatch(message);
      expect(error.code).toBe('ERR_LORA_INVALID');
      expect(error.message).toContain('Adapter "pixel"');
    }
  });

  it('never fails with anything but an UnetdError, whatever the shapes', async () => {
    const shape = fc.array(fc.constantFrom(0, 1, 2, 3, 320), { maxLength: 5 });
    const parts = fc.dictionary(
      fc.constantFrom('lora_down.weight', 'lora_up.weight', 'lora_mid.weight', 'alpha'),
      shape,
    );
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(LINEAR, CONV1, CONV3), parts, async (id, byPart) => {
        const tensors = Object.entries(byPart)
          .filter(([, size]) => count(size) <= 1_000_000)
          .map(([part, size]) => tensor(`${flat(id)}.${part}`, size));
        const result: unknown = await parse(tensors).catch((reason: unknown) => reason);
        if (result instanceof Error)
          expect(result).toMatchObject({ name: 'UnetdError', code: expect.stringMatching(/^ERR_LORA_/) });
      }),
      { seed: SEED, numRuns: 300 },
    );
  });
});

describe('an adapter kind that is not applied', () => {
  it('is refused with its key and kind, even beside plain LoRA layers', async () => {
    const kinds: Record<string, string> = {
      lora_magnitude_vector: 'DoRA of PEFT',
      oft_diag: 'OFT of another form',
      boft_R: 'OFT of another form',
      'bm1.weight': 'GLoRA with a core',
      ia3_l: 'IA3',
      bias_values: 'sparse bias',
      'lora_A.bias': 'bias of a down projection',
    };
    for (const [ending, kind] of Object.entries(kinds)) {
      const key = `${flat(LINEAR)}.${ending}`;
      const error = await failure([...pair(LINEAR, [4, 320], [320, 4]), tensor(key, [4, 4])]);
      expect(error.code).toBe('ERR_LORA_UNSUPPORTED');
      expect(error.message).toContain(`holds ${key} for ${LINEAR}, of the kind ${kind}`);
      expect(error.details).toMatchObject({ key, kind, layer: LINEAR });
    }
    const norm = await failure([tensor(`${flat('input_blocks.1.1.norm')}.lora_up.weight`, [320, 4])]);
    expect(norm.code).toBe('ERR_LORA_UNSUPPORTED');
    expect(norm.message).toContain('applied to biases and norms are: full difference, replaced tensor');
    const bias = await failure([tensor('diffusion_model.out.2.bias.hada_w1_a', [4, 4])]);
    expect(bias.message).toContain(
      'holds diffusion_model.out.2.bias.hada_w1_a for out.2.bias, of the kind LoHa',
    );
  });

  it('is no error on a text encoder', async () => {
    const key = 'lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a';
    const adapter = await parse([...pair(LINEAR, [4, 320], [320, 4]), tensor(key, [4, 4])]);
    expect(adapter.unmatched).toEqual([key]);
  });
});
