/** Detection of UNets from names and shapes, against the shape lists of ComfyUI's own models. No GPU. */
import { describe, expect, it } from 'vitest';
import type { UnetdError } from '../../src/errors.ts';
import type { UNetConfig } from '../../src/unet/config.ts';
import { detectUNet, findUNet, inspectUNet } from '../../src/unet/detect.ts';
import { diffusersNames, ldmNames } from '../../src/unet/diffusers.ts';
import { layersOf, tensorsOf } from '../../src/unet/layers.ts';
import { diffusersOf, MODELS, shapesOf } from '../fixtures/shapes/load.ts';

function failure(run: () => unknown): UnetdError {
  try {
    run();
  } catch (error) {
    expect(error).toMatchObject({ code: 'ERR_MODEL_INVALID' });
    return error as UnetdError;
  }
  throw new Error('nothing was thrown');
}

/** Depth of the transformer in each block, 0 where there is none. */
function depths(blocks: UNetConfig['input']): readonly number[] {
  return blocks.map((modules) =>
    modules.reduce((depth, module) => (module.kind === 'transformer' ? module.depth : depth), 0),
  );
}

/** Widths and counts of the heads, by channels. */
function heads(config: UNetConfig): ReadonlySet<string> {
  const found = new Set<string>();
  for (const module of [...config.input.flat(), ...config.middle, ...config.output.flat()]) {
    if (module.kind === 'transformer') found.add(`${module.channels}=${module.heads}x${module.headDim}`);
  }
  return found;
}

function prefixed<T>(prefix: string, map: ReadonlyMap<string, T>): Map<string, T> {
  return new Map([...map].map(([name, value]) => [prefix + name, value]));
}

describe('detectUNet', () => {
  it.each(MODELS)('finds a structure for %s that needs exactly the tensors the model has', (model) => {
    const shapes = shapesOf(model);
    const config = detectUNet(shapes);
    const needed = tensorsOf(config);
    expect([...needed.keys()].sort()).toEqual([...shapes.keys()].sort());
    for (const [name, shape] of needed) expect(shape, name).toEqual(shapes.get(name));
  });

  it('reads widths, depths and heads of SD 1.5', () => {
    const config = detectUNet(shapesOf('sd15'));
    expect(config).toMatchObject({
      inChannels: 4,
      outChannels: 4,
      modelChannels: 320,
      timeEmbedDim: 1280,
      contextDim: 768,
      admChannels: null,
    });
    expect(depths(config.input)).toEqual([0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0]);
    expect(depths(config.output)).toEqual([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
    expect(heads(config)).toEqual(new Set(['320=8x40', '640=8x80', '1280=8x160']));
    expect(config.input[1]).toEqual([
      { kind: 'res', id: 'input_blocks.1.0', inChannels: 320, outChannels: 320 },
      {
        kind: 'transformer',
        id: 'input_blocks.1.1',
        channels: 320,
        depth: 1,
        heads: 8,
        headDim: 40,
        contextDim: 768,
        linearProjection: false,
      },
    ]);
    expect(config.input[3]).toEqual([{ kind: 'down', id: 'input_blocks.3.0', channels: 320 }]);
    expect(config.output[2]).toEqual([
      { kind: 'res', id: 'output_blocks.2.0', inChannels: 2560, outChannels: 1280 },
      { kind: 'up', id: 'output_blocks.2.1', channels: 1280 },
    ]);
    expect(config.output[5]?.[2]).toEqual({ kind: 'up', id: 'output_blocks.5.2', channels: 1280 });
  });

  it('reads the other families', () => {
    expect(detectUNet(shapesOf('sd15-inpaint')).inChannels).toBe(9);
    const sd21 = detectUNet(shapesOf('sd21'));
    expect(sd21).toMatchObject({ contextDim: 1024, admChannels: null });
    expect(heads(sd21)).toEqual(new Set(['320=5x64', '640=10x64', '1280=20x64']));
    expect(detectUNet(shapesOf('sd21-unclip-h')).admChannels).toBe(2048);
    const sdxl = detectUNet(shapesOf('sdxl'));
    expect(sdxl).toMatchObject({ contextDim: 2048, admChannels: 2816 });
    expect(depths(sdxl.input)).toEqual([0, 0, 0, 0, 2, 2, 0, 10, 10]);
    expect(depths(sdxl.output)).toEqual([10, 10, 10, 2, 2, 2, 0, 0, 0]);
    const refiner = detectUNet(shapesOf('sdxl-refiner'));
    expect(refiner).toMatchObject({ modelChannels: 384, contextDim: 1280, admChannels: 2560 });
    expect(heads(refiner)).toEqual(new Set(['768=12x64', '1536=24x64']));
  });

  it('reads distilled models, whose middle is a single ResBlock or absent', () => {
    const kinds = (config: UNetConfig): readonly string[] => config.middle.map(({ kind }) => kind);
    const ssd = detectUNet(shapesOf('ssd-1b'));
    expect(kinds(ssd)).toEqual(['res']);
    expect(depths(ssd.output)).toEqual([4, 4, 10, 2, 1, 1, 0, 0, 0]);
    expect(kinds(detectUNet(shapesOf('vega')))).toEqual(['res']);
    expect(kinds(detectUNet(shapesOf('koala-700m')))).toEqual([]);
    expect(kinds(detectUNet(shapesOf('koala-1b')))).toEqual(['res', 'transformer', 'res']);
  });

  it.each(['sd15', 'koala-700m'] as const)(
    'refuses %s without any one of its tensors, naming it or its module',
    (model) => {
      const shapes = shapesOf(model);
      for (const [name, shape] of [...shapes]) {
        shapes.delete(name);
        const { message } = failure(() => detectUNet(shapes));
        const path = name.split('.').slice(0, -1).join('.');
        const parts = path.split('.').map((_, i, all) => all.slice(0, i + 1).join('.'));
        expect(
          parts.slice(-4).some((part) => message.includes(part)),
          `${name}: ${message}`,
        ).toBe(true);
        shapes.set(name, shape);
      }
    },
  );

  it('refuses a tensor of another shape with a message that names a tensor or module', () => {
    const shapes = shapesOf('sd15');
    for (const [name, shape] of [...shapes].filter((_, index) => index % 4 === 0)) {
      for (const other of [shape.map((size, i) => (i === 0 ? size + 32 : size)), [...shape, 1], [1]]) {
        shapes.set(name, other);
        expect(failure(() => detectUNet(shapes)).message).toMatch(/blocks|block\.|embed|out\./);
      }
      shapes.set(name, shape);
    }
  });

  it('says both shapes of a tensor that does not fit, and how many more there are', () => {
    const shapes = shapesOf('sd15');
    shapes.set('input_blocks.1.1.proj_in.bias', [640]);
    shapes.set('out.2.bias', [9]);
    const error = failure(() => detectUNet(shapes));
    expect(error.message).toContain(
      'input_blocks.1.1.proj_in.bias: expected [320], got [640] (and 1 more tensors)',
    );
    expect(error.details).toMatchObject({ count: 2 });
  });

  it('lists the first missing tensors with a count', () => {
    const shapes = shapesOf('sd15');
    for (const name of [...shapes.keys()]) if (name.endsWith('.norm1.bias')) shapes.delete(name);
    const { message } = failure(() => detectUNet(shapes));
    expect(message).toMatch(
      /of the 686 tensors it needs 16 are missing: input_blocks\.1\.1\..*norm1\.bias.* and 11 more/,
    );
  });

  it('refuses blocks that do not pair up', () => {
    const cut = (test: (name: string) => boolean): string => {
      const shapes = shapesOf('sd15');
      for (const name of [...shapes.keys()]) if (test(name)) shapes.delete(name);
      return failure(() => detectUNet(shapes)).message;
    };
    expect(cut((name) => name.startsWith('input_blocks.5.'))).toContain(
      'input_blocks.5 is missing, but input_blocks.11 is there',
    );
    expect(cut((name) => name.startsWith('output_blocks.11.'))).toContain(
      'The skip of input_blocks.0 has no output block',
    );
    expect(cut((name) => name.startsWith('input_blocks.11.'))).toContain('output_blocks.2 works at');
    expect(cut((name) => name.startsWith('output_blocks.5.2.'))).toMatch(
      /output_blocks\.6 works at 1\/4 .* input_blocks\.5 at 1\/2/,
    );
  });

  it('refuses channels that do not divide into the groups of a norm', () => {
    const shapes = shapesOf('sd15');
    for (const [name, shape] of shapes)
      shapes.set(
        name,
        shape.map((size) => (size % 320 === 0 ? (size / 320) * 328 : size)),
      );
    expect(failure(() => detectUNet(shapes)).message).toMatch(/normalises 328 channels, .* 32 groups/);
  });

  it('refuses quantised and video weights, which would give wrong numbers if read plainly', () => {
    const extra: Record<string, RegExp> = {
      'input_blocks.1.1.proj_in.scale_weight': /scaled or quantised weights/,
      scaled_fp8: /scaled or quantised weights/,
      'out.2.weight.absmax': /quantised weights/,
      'input_blocks.1.1.time_stack.0.attn1.to_q.weight': /video layers/,
    };
    for (const [name, message] of Object.entries(extra)) {
      expect(failure(() => detectUNet(shapesOf('sd21').set(name, [1]))).message).toMatch(message);
    }
  });
});

describe('inspectUNet', () => {
  it('finds a UNet inside a checkpoint, alone, and in diffusers layout', () => {
    const shapes = shapesOf('sd15');
    const config = detectUNet(shapes);
    const rest: readonly (readonly [string, readonly number[]])[] = [
      ['first_stage_model.decoder.conv_in.weight', [512, 4, 3, 3]],
      ['cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight', [3072, 768]],
      ['model_ema.decay', []],
    ];
    for (const prefix of ['model.diffusion_model.', 'diffusion_model.', '']) {
      const found = inspectUNet(new Map([...rest, ...prefixed(prefix, shapes)]));
      expect(found).toMatchObject({ layout: 'ldm', prefix, config });
      expect(found.sources.get('out.2.bias')).toBe(`${prefix}out.2.bias`);
      expect(found.unused).toEqual(prefix === '' ? rest.map(([name]) => name) : []);
    }
    for (const prefix of ['', 'unet.']) {
      const found = inspectUNet(prefixed(prefix, diffusersShapes('sd15')));
      expect(found).toMatchObject({ layout: 'diffusers', prefix, config, unused: [] });
      expect(found.sources.get('out.2.bias')).toBe(`${prefix}conv_out.bias`);
    }
  });

  it('reports tensors that it has no use for', () => {
    expect(inspectUNet(shapesOf('sdxl').set('v_pred', [0])).unused).toEqual(['v_pred']);
  });

  it('says what a file looks like that is no UNet', () => {
    const files: Record<string, readonly string[]> = {
      'a VAE': ['decoder.conv_in.weight', 'encoder.down.0.block.0.conv1.weight'],
      'a LoRA adapter': ['lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight'],
      'a DiT (Flux)': ['model.diffusion_model.double_blocks.0.img_attn.qkv.weight'],
      'a DiT (SD 3)': ['model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight'],
      'a DiT': ['transformer_blocks.0.attn1.to_q.weight'],
      'a ControlNet': ['control_model.input_blocks.0.0.weight', 'control_model.input_hint_block.0.weight'],
      'a text encoder': ['text_model.encoder.layers.0.mlp.fc1.weight'],
      'an AnimateDiff motion module': ['down_blocks.0.motion_modules.0.temporal_transformer.norm.weight'],
    };
    for (const [kind, names] of Object.entries(files)) {
      const error = failure(() => inspectUNet(new Map(names.map((name) => [name, [1, 1]]))));
      expect(error.message).toContain(`It looks like ${kind}. Give a UNet of`);
      expect(error.details).toEqual({ looksLike: kind });
    }
    expect(failure(() => inspectUNet(new Map())).message).toMatch(
      /neither input_blocks\.0\.0\.weight nor conv_in\.weight/,
    );
    const encoder = [...shapesOf('sd15')].filter(([name]) => !name.startsWith('out'));
    const controlNet = new Map([...encoder, ['zero_convs.0.0.weight', [320, 320, 1, 1]] as const]);
    expect(failure(() => inspectUNet(controlNet)).message).toContain('It looks like a ControlNet');
  });

  it('takes conv_in.weight for a UNet only beside a time embedding', () => {
    expect(findUNet(['conv_in.weight', 'decoder.conv_in.weight'])).toBeNull();
    expect(findUNet(['conv_in.weight', 'time_embedding.linear_1.weight'])).toEqual({
      layout: 'diffusers',
      prefix: '',
    });
  });
});

function diffusersShapes(model: 'sd15' | 'sdxl' | 'koala-700m'): Map<string, readonly number[]> {
  const shapes = shapesOf(model);
  return new Map(
    [...diffusersNames(detectUNet(shapes))]
      .filter(([ldm]) => shapes.has(ldm))
      .map(([ldm, name]) => [name, shapes.get(ldm)!]),
  );
}

describe('diffusers names', () => {
  it.each(['sd15', 'sdxl', 'koala-700m'] as const)('are those of ComfyUI for every tensor of %s', (model) => {
    const config = detectUNet(shapesOf(model));
    const expected = diffusersOf(model);
    const labels =
      config.admChannels === null
        ? (['add_embedding'] as const)
        : (['add_embedding', 'class_embedding'] as const);
    const ours = new Map<string, string>();
    for (const label of labels) {
      for (const [ldm, name] of diffusersNames(config, label))
        if (/\.(weight|bias)$/.test(ldm)) ours.set(name, ldm);
    }
    expect(ours).toEqual(expected);
  });

  it.each(MODELS)('lead back to the LDM names of every tensor of %s', (model) => {
    const config = detectUNet(shapesOf(model));
    const tensors = [...tensorsOf(config).keys()];
    const names = diffusersNames(config);
    const back = ldmNames(tensors.map((name) => names.get(name)!));
    expect(new Map([...back].sort())).toEqual(
      new Map(tensors.map((name) => [name, names.get(name)!] as const).sort()),
    );
  });

  it('exist for every layer, without `.weight`', () => {
    const config = detectUNet(shapesOf('sdxl'));
    const names = diffusersNames(config);
    for (const { id } of layersOf(config)) expect(names.has(id), id).toBe(true);
    expect(names.get('input_blocks.3.0.op')).toBe('down_blocks.0.downsamplers.0.conv');
    expect(names.get('output_blocks.2.2.conv')).toBe('up_blocks.0.upsamplers.0.conv');
    expect(names.get('label_emb.0.2')).toBe('add_embedding.linear_2');
    expect(names.get('middle_block.2.in_layers.2')).toBe('mid_block.resnets.1.conv1');
  });
});

describe('layersOf', () => {
  it('lists every weight of two or four dimensions, once, with its sizes', () => {
    for (const model of MODELS) {
      const shapes = shapesOf(model);
      const layers = layersOf(detectUNet(shapes));
      const matrices = [...shapes].filter(([name, shape]) => name.endsWith('.weight') && shape.length > 1);
      expect(layers.map(({ id }) => `${id}.weight`).sort()).toEqual(matrices.map(([name]) => name).sort());
      for (const { id, kind, inFeatures, outFeatures, kernel } of layers) {
        const shape =
          kind === 'linear' ? [outFeatures, inFeatures] : [outFeatures, inFeatures, kernel, kernel];
        expect(shape, id).toEqual(shapes.get(`${id}.weight`));
      }
    }
  });
});
