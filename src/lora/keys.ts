/**
 * From the keys of a LoRA file to (layer of the UNet, part of an adapter): tables of the names that trainers write.
 * Nothing else sees file keys. Reads no tensors.
 */
import type { Layer, UNetConfig } from '../unet/config.ts';
import { diffusersNames } from '../unet/diffusers.ts';
import { partsOf } from '../unet/layers.ts';

/** A way of stating a change of a weight; algebra.ts says which are applied. `any` goes with each of them. */
export type AdapterKind =
  | 'any'
  | 'LoRA'
  | 'DoRA'
  | 'LoHa'
  | 'LoKr'
  | 'GLoRA'
  | 'OFT/BOFT'
  | 'IA3'
  | 'full difference'
  | 'replaced weight';

/** Endings of keys, first match wins. The part is what algebra.ts calls the tensor. */
const ENDINGS: readonly (readonly [RegExp, AdapterKind, string])[] = [
  // kohya, LyCORIS and LDM names; attention processors (`to_q_lora.down`); diffusers; PEFT (`lora_A` is down).
  [
    /(?:\.lora_down|_lora\.down|\.lora\.down|\.lora_linear_layer\.down|\.lora_A(?:\.default)?)\.weight$/,
    'LoRA',
    'down',
  ],
  [
    /(?:\.lora_up|_lora\.up|\.lora\.up|\.lora_linear_layer\.up|\.lora_B(?:\.default)?)\.weight$/,
    'LoRA',
    'up',
  ],
  [/\.lora_A$/, 'LoRA', 'down'],
  [/\.lora_B$/, 'LoRA', 'up'],
  [/\.lora_mid\.weight$/, 'LoRA', 'mid'],
  [/\.alpha$/, 'any', 'alpha'],
  [/\.(?:dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)$/, 'DoRA', 'dora_scale'],
  [/\.hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)$/, 'LoHa', 'hada'],
  [/\.lokr_(?:w1|w1_a|w1_b|w2|w2_a|w2_b|t2)$/, 'LoKr', 'lokr'],
  [/\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$/, 'GLoRA', 'glora'],
  [/\.(?:oft_blocks|oft_diag|oft_R(?:\.default)?(?:\.weight)?|boft_[RS]|rescale)$/, 'OFT/BOFT', 'oft'],
  [/\.(?:on_input|ia3_l(?:\.default)?)$/, 'IA3', 'ia3'],
  [
    /\.(?:diff|diff_b|w_norm|b_norm|lora_[AB]\.bias|bias_(?:indices|values|size))$/,
    'full difference',
    'diff',
  ],
  [/\.(?:set_weight|reshape_weight)$/, 'replaced weight', 'set'],
];

/** Beginnings of keys: what stands before a layer's name, and how that name is written. First match wins. */
const BEGINNINGS: readonly (readonly [RegExp, string, 'dots' | 'underscores'])[] = [
  [/^lora_unet_/, 'kohya', 'underscores'],
  [/^lycoris_/, 'lycoris', 'underscores'],
  [/^(?:base_model\.model\.)?(?:model\.)?diffusion_model\.(?:base_model\.model\.)?/, 'ldm', 'dots'],
  [/^(?:base_model\.model\.)?(?:unet\.)?(?:base_model\.model\.)?/, 'diffusers', 'dots'],
];

/** A leaf module of the UNet that keys can name. `layer` is null for norms, which only full differences address. */
export interface Target {
  readonly id: string;
  readonly layer: Layer | null;
}

/** Layer names as files write them, with dots and with underscores, LDM and diffusers alike. */
export interface TargetNames {
  readonly dots: ReadonlyMap<string, Target>;
  readonly underscores: ReadonlyMap<string, Target>;
}

export interface Key {
  readonly target: Target;
  readonly kind: AdapterKind;
  readonly part: string;
  readonly format: string;
}

/** Every name under which files address the leaf modules of a UNet. */
export function targetNames(config: UNetConfig): TargetNames {
  const spellings = [diffusersNames(config, 'add_embedding'), diffusersNames(config, 'class_embedding')];
  const dots = new Map<string, Target>();
  const underscores = new Map<string, Target>();
  for (const { id, kind, inFeatures, outFeatures, kernel } of partsOf(config)) {
    const isLayer = kind === 'linear' || kind === 'conv';
    const target: Target = { id, layer: isLayer ? { id, kind, inFeatures, outFeatures, kernel } : null };
    for (const name of new Set([id, ...spellings.map((names) => names.get(id) ?? id)])) {
      underscores.set(name.replaceAll('.', '_'), target);
      for (const form of dottedForms(name)) dots.set(form, target);
    }
  }
  return { dots, underscores };
}

/** `attn1.to_out.0` is also `attn1.to_out`, and in attention processors `attn1.processor.to_out`. */
function dottedForms(name: string): readonly string[] {
  const forms = [name];
  if (name.endsWith('.to_out.0')) forms.push(name.slice(0, -'.0'.length));
  return [
    ...forms,
    ...forms.filter((form) => form.includes('.to_')).map((form) => form.replace('.to_', '.processor.to_')),
  ];
}

/** The ending of a key: `stem` is what stands before it. Null where no adapter kind has such an ending. */
export function splitKey(
  key: string,
): { readonly stem: string; readonly kind: AdapterKind; readonly part: string } | null {
  for (const [ending, kind, part] of ENDINGS) {
    const at = key.search(ending);
    if (at >= 0) return { stem: key.slice(0, at), kind, part };
  }
  return null;
}

/** What a key of a file addresses in a UNet with these names, or null. */
export function readKey(key: string, names: TargetNames): Key | null {
  const split = splitKey(key);
  if (split === null) return null;
  for (const [beginning, format, style] of BEGINNINGS) {
    const match = beginning.exec(split.stem);
    if (match === null) continue;
    const target = findTarget(names, style, split.stem.slice(match[0].length), split.kind);
    if (target === undefined) return null;
    const isPeft = format === 'diffusers' && /\.lora_[AB](\.|$)/.test(key);
    return { target, kind: split.kind, part: split.part, format: isPeft ? 'peft' : format };
  }
  return null;
}

/** A name may also be that of a bias, where a bias is replaced or gets a difference of its own (`out.2.bias.diff`). */
function findTarget(
  names: TargetNames,
  style: keyof TargetNames,
  name: string,
  kind: AdapterKind,
): Target | undefined {
  const target = names[style].get(name);
  if (target !== undefined || kind === 'LoRA' || kind === 'any' || !name.endsWith('.bias')) return target;
  const owner = names[style].get(name.slice(0, -'.bias'.length));
  return owner === undefined ? undefined : { id: `${owner.id}.bias`, layer: null };
}

/** Whether a key belongs to a text encoder, which this program does not run. */
export function isTextEncoderKey(key: string): boolean {
  return /^(?:lora_te\d?_|(?:base_model\.model\.)?text_encoders?(?:_\d)?\.|lora_prior_te_)/.test(key);
}
