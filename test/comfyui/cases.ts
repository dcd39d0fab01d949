/** The workflows that must give the same picture with a local and a remote UNet. Every node but the loader is stock. */
import { conditioning, type Recipe, type Ref, type Sampling, type Stage } from './workflow.ts';

export interface Case extends Recipe {
  readonly name: string;
  /** The case that this one must differ from visibly, or nothing it is about had an effect. */
  readonly unlike?: string;
}

/** One more LoRA on the model. */
export function lora(stage: Stage, name: string, strength: number): void {
  const inputs = { model: stage.model, lora_name: `${name}.safetensors`, strength_model: strength };
  stage.model = stage.workflow.add('LoraLoaderModelOnly', inputs)(0);
}

/** Half of the strength from half of the schedule on. */
function scheduledHook({ workflow, ...stage }: Stage, name: string): Ref {
  const create = { lora_name: `${name}.safetensors`, strength_model: 1, strength_clip: 0 };
  const hooks = workflow.add('CreateHookLora', create)(0);
  const first = workflow.add('CreateHookKeyframe', { strength_mult: 1, start_percent: 0 })(0);
  const second = { strength_mult: 0.2, start_percent: 0.5, prev_hook_kf: first };
  const hook_kf = workflow.add('CreateHookKeyframe', second)(0);
  const scheduled = workflow.add('SetHookKeyframes', { hooks, hook_kf })(0);
  const properties = { cond_NEW: stage.positive, strength: 1, set_cond_area: 'default', hooks: scheduled };
  return workflow.add('ConditioningSetProperties', properties)(0);
}

function control({ workflow, ...stage }: Stage, name: string, strength: number): readonly [Ref, Ref] {
  const control_net = workflow.add('ControlNetLoader', { control_net_name: `${name}.safetensors` })(0);
  const applied = workflow.add('ControlNetApplyAdvanced', {
    positive: stage.positive,
    negative: stage.negative,
    control_net,
    image: workflow.add('LoadImage', { image: 'hint.png' })(0),
    strength,
    start_percent: 0,
    end_percent: 0.9,
  });
  return [applied(0), applied(1)];
}

/** 1 in a rectangle of a picture of 128x128, 0 elsewhere. */
function mask({ workflow }: Stage): Ref {
  const solid = (value: number, width: number, height: number): Ref =>
    workflow.add('SolidMask', { value, width, height })(0);
  const [destination, source] = [solid(0, 128, 128), solid(1, 64, 80)];
  return workflow.add('MaskComposite', { destination, source, x: 40, y: 24, operation: 'add' })(0);
}

/** Real prompts, with a LoRA on the UNet and on the text encoder. */
function withText(stage: Stage, clip: Ref): void {
  const { workflow } = stage;
  const loader = workflow.add('LoraLoader', {
    model: stage.model,
    clip,
    lora_name: 'sd15-style-and-text.safetensors',
    strength_model: 0.7,
    strength_clip: 0.9,
  });
  stage.model = loader(0);
  stage.positive = workflow.add('CLIPTextEncode', { clip: loader(1), text: 'a quiet harbour' })(0);
  stage.negative = workflow.add('CLIPTextEncode', { clip: loader(1), text: 'blurry' })(0);
}

const SAMPLERS: readonly Partial<Sampling>[] = [
  { sampler_name: 'euler', cfg: 7 },
  { sampler_name: 'euler', cfg: 1 },
  { sampler_name: 'dpmpp_2m', scheduler: 'karras', cfg: 7 },
  { sampler_name: 'dpmpp_2m', scheduler: 'karras', cfg: 1 },
  { sampler_name: 'dpmpp_2m_sde', cfg: 7 },
  { sampler_name: 'dpmpp_2m_sde', cfg: 1 },
  { sampler_name: 'euler_ancestral', cfg: 7 },
  { sampler_name: 'euler_ancestral', cfg: 1 },
];

/** Cases with masks, areas and pictures to start from. */
const SIDES = { width: 128, height: 128 } as const;
const LARGE = 'sd15, 128x128';
const PLAIN = 'sd15, euler, cfg 7';

export const CASES: readonly Case[] = [
  ...(['sd15', 'sdxl'] as const).flatMap((model) =>
    SAMPLERS.map((sampling) => ({
      name: `${model}, ${sampling.sampler_name}, cfg ${sampling.cfg}`,
      model,
      sampling,
    })),
  ),
  { name: 'sd15 of one level', model: 'sd15-one-level' },
  { name: 'sd15 from a diffusion-model file', model: 'sd15-unet' },
  { name: 'sd15, batch of 2', model: 'sd15', batch: 2 },
  { name: 'sdxl, batch of 2', model: 'sdxl', batch: 2 },
  { name: LARGE, model: 'sd15', ...SIDES },
  { name: 'sd15, 136x104', model: 'sd15', width: 136, height: 104 },
  { name: 'sdxl, 136x104', model: 'sdxl', width: 136, height: 104 },
  ...(['sd15', 'sdxl'] as const).map((model) => ({
    name: `${model}, 231 tokens against 77`,
    model,
    unlike: `${model}, euler, cfg 7`,
    change: (stage: Stage) => {
      stage.positive = conditioning(stage.workflow, stage.family, 1, 231);
    },
  })),
  {
    name: 'sd15, LoRA',
    model: 'sd15',
    unlike: PLAIN,
    change: (stage) => lora(stage, 'sd15-style', 1),
  },
  {
    name: 'sdxl, LoRA',
    model: 'sdxl',
    unlike: 'sdxl, euler, cfg 7',
    change: (stage) => lora(stage, 'sdxl-style', 1),
  },
  {
    name: 'sd15, LoCon',
    model: 'sd15',
    unlike: PLAIN,
    change: (stage) => lora(stage, 'sd15-locon', 0.9),
  },
  {
    name: 'sd15, stack of three LoRAs, one of them negative',
    model: 'sd15',
    unlike: 'sd15, LoRA',
    change: (stage) => {
      lora(stage, 'sd15-style', 1);
      lora(stage, 'sd15-subject', -0.8);
      lora(stage, 'sd15-peft', 0.5);
    },
  },
  {
    name: 'sd15, scheduled hook',
    model: 'sd15',
    unlike: PLAIN,
    change: (stage) => {
      stage.positive = scheduledHook(stage, 'sd15-style');
    },
  },
  {
    name: 'sd15, scheduled hook over a LoRA',
    model: 'sd15',
    unlike: 'sd15, scheduled hook',
    change: (stage) => {
      lora(stage, 'sd15-locon', 0.5);
      stage.positive = scheduledHook(stage, 'sd15-style');
    },
  },
  {
    name: 'sd15, LoRA on UNet and text encoder',
    model: 'sd15',
    unlike: PLAIN,
    change: (stage) => {
      const inputs = { clip_name: 'clip_l.safetensors', type: 'stable_diffusion' };
      withText(stage, stage.workflow.add('CLIPLoader', inputs)(0));
    },
  },
  {
    name: 'sd15, CLIP of the checkpoint, LoRA on both',
    model: 'sd15-whole',
    unlike: PLAIN,
    change: (stage) => withText(stage, [stage.model[0], 1]),
  },
  {
    name: 'sd15, ControlNet',
    model: 'sd15',
    ...SIDES,
    unlike: LARGE,
    change: (stage) => {
      [stage.positive, stage.negative] = control(stage, 'sd15', 0.8);
    },
  },
  {
    name: 'sd15, ControlNet and LoRA, batch of 2',
    model: 'sd15',
    batch: 2,
    unlike: 'sd15, batch of 2',
    change: (stage) => {
      lora(stage, 'sd15-style', 1);
      [stage.positive, stage.negative] = control(stage, 'sd15', 0.8);
    },
  },
  { name: 'sd15 of full size', model: 'sd15-full', sampling: { steps: 2, cfg: 1 } },
  {
    name: 'sd15 of full size, T2I-Adapter',
    model: 'sd15-full',
    sampling: { steps: 2, cfg: 1 },
    unlike: 'sd15 of full size',
    change: (stage) => {
      [stage.positive, stage.negative] = control(stage, 't2i-sd15-full', 0.8);
    },
  },
  {
    name: 'sd15 inpaint model of 9 channels',
    model: 'sd15-inpaint',
    change: (stage) => {
      const inpaint = stage.workflow.add('InpaintModelConditioning', {
        positive: stage.positive,
        negative: stage.negative,
        vae: stage.vae,
        pixels: stage.workflow.add('LoadImage', { image: 'hint.png' })(0),
        mask: mask(stage),
        noise_mask: true,
      });
      [stage.positive, stage.negative, stage.latent] = [inpaint(0), inpaint(1), inpaint(2)];
    },
  },
  {
    name: 'sd15, noise mask on an encoded picture',
    model: 'sd15',
    sampling: { denoise: 0.7 },
    change: (stage) => {
      const pixels = stage.workflow.add('LoadImage', { image: 'hint.png' })(0);
      const samples = stage.workflow.add('VAEEncode', { pixels, vae: stage.vae })(0);
      stage.latent = stage.workflow.add('SetLatentNoiseMask', { samples, mask: mask(stage) })(0);
    },
  },
  {
    name: 'sd15, area conditioning',
    model: 'sd15',
    ...SIDES,
    unlike: LARGE,
    change: (stage) => {
      const part = stage.workflow.add('ConditioningSetArea', {
        conditioning: conditioning(stage.workflow, stage.family, 3),
        width: 64,
        height: 128,
        x: 64,
        y: 0,
        strength: 1,
      })(0);
      const both = { conditioning_1: stage.positive, conditioning_2: part };
      stage.positive = stage.workflow.add('ConditioningCombine', both)(0);
    },
  },
];
