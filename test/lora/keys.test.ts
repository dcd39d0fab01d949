/** The names that LoRA files give layers, against ComfyUI's own list of diffusers names. No GPU. */
import { describe, expect, it } from 'vitest';
import { isTextEncoderKey, readKey, splitKey, type TargetNames, targetNames } from '../../src/lora/keys.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { diffusersOf, type Model, shapesOf } from '../fixtures/shapes/load.ts';

const MODELS = ['sd15', 'sdxl', 'koala-700m'] as const;

function namesOf(model: Model): TargetNames {
  return targetNames(detectUNet(shapesOf(model)));
}

/** [diffusers id, LDM id] of every layer, from ComfyUI's table; norms are left out. */
function layersOf(model: (typeof MODELS)[number]): readonly (readonly [string, string])[] {
  const shapes = shapesOf(model);
  return [...diffusersOf(model)]
    .filter(([, ldm]) => ldm.endsWith('.weight') && shapes.get(ldm)!.length > 1)
    .map(([name, ldm]) => [name.slice(0, -'.weight'.length), ldm.slice(0, -'.weight'.length)] as const);
}

describe('readKey', () => {
  it.each(MODELS)('finds every layer of %s under each spelling of its name', (model) => {
    const names = namesOf(model);
    const expectKey = (key: string, id: string, part: string, format: string): void => {
      expect(readKey(key, names), key).toMatchObject({
        kind: 'LoRA',
        part,
        format,
        leaf: 'weight',
        target: { id },
      });
    };
    const layers = layersOf(model);
    expect(layers.length).toBeGreaterThan(250);
    for (const [name, id] of layers) {
      const flat = (text: string): string => text.replaceAll('.', '_');
      expectKey(`lora_unet_${flat(name)}.lora_down.weight`, id, 'down', 'kohya');
      expectKey(`lora_unet_${flat(id)}.lora_up.weight`, id, 'up', 'kohya');
      expectKey(`lycoris_${flat(name)}.lora_mid.weight`, id, 'mid', 'lycoris');
      expectKey(`diffusion_model.${id}.lora_up.weight`, id, 'up', 'ldm');
      expectKey(`model.diffusion_model.${id}.lora_down.weight`, id, 'down', 'ldm');
      expectKey(`diffusion_model.${id}.lora_A.weight`, id, 'down', 'ldm');
      expectKey(`unet.${name}.lora_A.weight`, id, 'down', 'peft');
      expectKey(`unet.${name}.lora_B.weight`, id, 'up', 'peft');
      expectKey(`${name}.lora_B.default.weight`, id, 'up', 'peft');
      expectKey(`base_model.model.unet.${name}.lora_A.weight`, id, 'down', 'peft');
      expectKey(`base_model.model.${name}.lora_A.weight`, id, 'down', 'peft');
      expectKey(`unet.base_model.model.${name}.lora_B`, id, 'up', 'peft');
      expectKey(`unet.${name}.lora.down.weight`, id, 'down', 'diffusers');
      expectKey(`unet.${name}.lora_linear_layer.up.weight`, id, 'up', 'diffusers');
      if (!name.includes('.to_')) continue;
      // ComfyUI: `.to_` becomes `.processor.to_`, and `to_out.0` loses its number.
      const processor = `${name.replace('.to_', '.processor.to_').replace(/\.to_out\.0$/, '.to_out')}`;
      expectKey(`unet.${processor}_lora.down.weight`, id, 'down', 'diffusers');
      expectKey(`${processor}_lora.up.weight`, id, 'up', 'diffusers');
      expectKey(`unet.${processor}.lora_B.weight`, id, 'up', 'peft');
    }
  });

  it.each(['sd15', 'sdxl', 'ssd-1b', 'koala-1b'] as const)(
    'never finds two layers of %s under one name',
    (model) => {
      const { dots, underscores } = namesOf(model);
      const ids = (names: ReadonlyMap<string, { readonly id: string }>): ReadonlyMap<string, Set<string>> => {
        const byFlat = new Map<string, Set<string>>();
        for (const [name, { id }] of names) {
          const flat = name.replaceAll('.', '_');
          byFlat.set(flat, (byFlat.get(flat) ?? new Set()).add(id));
        }
        return byFlat;
      };
      for (const [name, found] of [...ids(dots), ...ids(underscores)]) expect(found.size, name).toBe(1);
    },
  );

  it('knows alpha and the kinds that are not plain LoRA, on norms too', () => {
    const names = namesOf('sd15');
    const stem = 'lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q';
    const kinds: Record<string, string> = {
      alpha: 'any',
      dora_scale: 'any',
      hada_w1_a: 'LoHa',
      hada_t2: 'LoHa',
      lokr_w1: 'LoKr',
      lokr_w2_b: 'LoKr',
      lokr_t2: 'LoKr',
      'a1.weight': 'GLoRA',
      'b2.weight': 'GLoRA',
      oft_blocks: 'OFT/BOFT',
      rescale: 'OFT/BOFT',
      oft_diag: 'OFT of another form',
      'oft_R.weight': 'OFT of another form',
      boft_S: 'OFT of another form',
      diff: 'full difference',
      w_norm: 'full difference',
      set_weight: 'replaced tensor',
      reshape_weight: 'LoRA',
      lora_magnitude_vector: 'DoRA of PEFT',
      'lora_magnitude_vector.default.weight': 'DoRA of PEFT',
      'bm1.weight': 'GLoRA with a core',
      on_input: 'IA3',
      bias_values: 'sparse bias',
      'lora_A.bias': 'bias of a down projection',
    };
    for (const [ending, kind] of Object.entries(kinds))
      expect(readKey(`${stem}.${ending}`, names)?.kind, ending).toBe(kind);
    const norm = readKey('lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1.w_norm', names);
    const id = 'input_blocks.1.1.transformer_blocks.0.norm1';
    expect(norm).toMatchObject({ target: { id, kind: 'norm' }, leaf: 'weight', part: 'w_norm' });
  });

  it('finds biases where the module has one', () => {
    const names = namesOf('sd15');
    const attention = 'input_blocks.1.1.transformer_blocks.0.attn1';
    const found: Record<string, string> = {
      'lora_unet_out_2.diff_b': 'out.2',
      'diffusion_model.out.2.diff_b': 'out.2',
      'diffusion_model.out.2.bias.diff': 'out.2',
      'diffusion_model.out.2.bias.set_weight': 'out.2',
      'diffusion_model.out.0.bias.diff': 'out.0',
      'lora_unet_out_0.b_norm': 'out.0',
      [`diffusion_model.${attention}.to_out.0.diff_b`]: `${attention}.to_out.0`,
    };
    for (const [key, id] of Object.entries(found))
      expect(readKey(key, names), key).toMatchObject({ target: { id }, leaf: 'bias' });
    for (const key of [
      `diffusion_model.${attention}.to_q.diff_b`,
      `diffusion_model.${attention}.to_q.bias.diff`,
      'unet.conv_out.bias.diff',
      'diffusion_model.out.2.bias.diff_b',
    ])
      expect(readKey(key, names), key).toBeNull();
  });

  it('finds nothing under names of other models, of text encoders or of nothing', () => {
    const names = namesOf('sd15');
    const keys = [
      'lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight',
      'text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight',
      'lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_k.lora_down.weight',
      'lora_unet_double_blocks_0_img_attn_proj.lora_down.weight',
      'lora_unet_conv.in.lora_down.weight',
      'unet.conv_in.weight',
      '.lora_down.weight',
      'lora_unet_.alpha',
      '',
    ];
    for (const key of keys) expect(readKey(key, names), key).toBeNull();
  });

  it('splits a key at its ending only', () => {
    expect(splitKey('a.alpha.lora_up.weight')).toEqual({
      stem: 'a.alpha',
      kind: 'LoRA',
      part: 'up',
      leaf: 'weight',
    });
    expect(splitKey('a.lora_up.weight.b')).toBeNull();
  });
});

describe('isTextEncoderKey', () => {
  it('knows the text encoders of each format', () => {
    const keys = [
      'lora_te_a',
      'lora_te1_a',
      'lora_te2_a',
      'text_encoder.a',
      'text_encoder_2.a',
      'text_encoders.clip_l.a',
    ];
    for (const key of keys) expect(isTextEncoderKey(key), key).toBe(true);
    for (const key of ['lora_unet_a', 'unet.text', 'lora_ted'])
      expect(isTextEncoderKey(key), key).toBe(false);
  });
});
