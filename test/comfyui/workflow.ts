/** Workflows in ComfyUI's API format: nodes by name, and the txt2img chain that the cases vary. Starts nothing. */

/** Output `[1]` of the node `[0]`. */
export type Ref = readonly [string, number];
type Input = string | number | boolean | Ref;

/** What is posted to `/prompt`. */
export type Prompt = Readonly<
  Record<string, { readonly class_type: string; readonly inputs: Readonly<Record<string, Input>> }>
>;

export class Workflow {
  readonly #nodes: Record<string, { class_type: string; inputs: Record<string, Input> }> = {};

  /** Adds a node and gives its outputs. Its name appears in ComfyUI's events; `sampler` is followed by the driver. */
  add(nodeType: string, inputs: Record<string, Input>, name?: string): (output: number) => Ref {
    const id = name ?? `${nodeType} ${Object.keys(this.#nodes).length}`;
    this.#nodes[id] = { class_type: nodeType, inputs };
    return (output) => [id, output];
  }

  get prompt(): Prompt {
    return this.#nodes;
  }
}

export interface Family {
  /** Width of the context and of the pooled vector. */
  readonly width: number;
  readonly pooled: number;
  readonly vae: string;
}

const SD15: Family = { width: 768, pooled: 0, vae: 'taesd' };
const SDXL: Family = { width: 2048, pooled: 1280, vae: 'taesdxl' };

export type ModelName =
  | 'sd15-one-level'
  | 'sd15'
  | 'sd15-whole'
  | 'sd15-unet'
  | 'sd15-inpaint'
  | 'sd15-full'
  | 'sdxl';

/** The files of models.py. */
export const FAMILIES: Readonly<Record<ModelName, Family>> = {
  'sd15-one-level': SD15,
  sd15: SD15,
  'sd15-whole': SD15,
  'sd15-unet': SD15,
  'sd15-inpaint': SD15,
  'sd15-full': SD15,
  sdxl: SDXL,
};

/** Adds the node that loads a model and gives its MODEL; a checkpoint's CLIP is the output after it. */
export type Loader = (workflow: Workflow, model: ModelName) => Ref;

const bare = (model: ModelName): boolean => model === 'sd15-unet';

/** ComfyUI's own loaders: the UNet runs in ComfyUI. */
export const local: Loader = (workflow, model) =>
  bare(model)
    ? workflow.add('UNETLoader', { unet_name: `${model}.safetensors`, weight_dtype: 'default' })(0)
    : workflow.add('CheckpointLoaderSimple', { ckpt_name: `${model}.safetensors` })(0);

/** The loaders under test. `server`: one address, or several joined by commas. */
export function remote(server: string, away: 'error' | 'wait' | 'local' = 'error'): Loader {
  return (workflow, model) => {
    const nodeType = bare(model) ? 'UnetdLoadDiffusionModel' : 'UnetdLoadCheckpoint';
    const inputs = { model: `${model}.safetensors`, server, when_away: away, dtype: 'auto' };
    return workflow.add(nodeType, inputs)(0);
  };
}

/** Everything between the loader and the sampler; a case replaces what it is about. */
export interface Stage {
  readonly workflow: Workflow;
  readonly family: Family;
  readonly vae: Ref;
  model: Ref;
  positive: Ref;
  negative: Ref;
  latent: Ref;
}

export interface Sampling {
  readonly seed: number;
  readonly steps: number;
  readonly cfg: number;
  readonly sampler_name: string;
  readonly scheduler: string;
  readonly denoise: number;
}

export interface Recipe {
  readonly model: ModelName;
  /** Of the picture, 64 unless stated: enough for both sides to do everything they do for a large one. */
  readonly width?: number;
  readonly height?: number;
  readonly batch?: number;
  readonly sampling?: Partial<Sampling>;
  readonly change?: (stage: Stage) => void;
}

const SAMPLING: Sampling = {
  seed: 42,
  steps: 4,
  cfg: 7,
  sampler_name: 'euler',
  scheduler: 'normal',
  denoise: 1,
};

/** A prompt's embedding: noise instead of a text encoder. */
export function conditioning(workflow: Workflow, family: Family, seed: number, tokens = 77): Ref {
  const { width, pooled } = family;
  return workflow.add('TestConditioning', { seed, tokens, width, pooled })(0);
}

export function build(recipe: Recipe, load: Loader): Prompt {
  const { model, width = 64, height = 64, batch = 1, sampling, change } = recipe;
  const workflow = new Workflow();
  const family = FAMILIES[model];
  const stage: Stage = {
    workflow,
    family,
    vae: workflow.add('VAELoader', { vae_name: family.vae })(0),
    model: load(workflow, model),
    positive: conditioning(workflow, family, 1),
    negative: conditioning(workflow, family, 2),
    latent: workflow.add('EmptyLatentImage', { width, height, batch_size: batch })(0),
  };
  change?.(stage);
  const latent = workflow.add(
    'KSampler',
    {
      ...{ ...SAMPLING, ...sampling },
      model: stage.model,
      positive: stage.positive,
      negative: stage.negative,
      latent_image: stage.latent,
    },
    'sampler',
  )(0);
  const images = workflow.add('VAEDecode', { samples: latent, vae: stage.vae })(0);
  workflow.add('SaveLatent', { samples: latent, filename_prefix: 'latents/test' });
  workflow.add('SaveImage', { images, filename_prefix: 'test' });
  return workflow.prompt;
}
