/**
 * From the keys of a LoRA file to (tensor of the UNet, part of an adapter): tables of the names that trainers write.
 * Nothing else sees file keys. Reads no tensors.
 */
import type { UNetConfig } from '../unet/config.ts';
import { diffusersNames } from '../unet/diffusers.ts';
import { type Part, partsOf } from '../unet/layers.ts';

/** A way of stating a change of a tensor; algebra.ts says which are applied. `any` goes with several of them. */
export type AdapterKind =
  | 'any'
  | 'LoRA'
  | 'LoHa'
  | 'LoKr'
  | 'GLoRA'
  | 'OFT/BOFT'
  | 'full difference'
  | 'replaced tensor'
  // What ComfyUI does not apply either.
  | 'DoRA of PEFT'
  | 'OFT of another form'
  | 'GLoRA with a core'
  | 'IA3'
  | 'sparse bias'
  | 'bias of a down projection';

/** The tensor of a module that a key changes. */
export type Leaf = 'weight' | 'bias';

/**
 * Endings of keys, first match wins. The part is what algebra.ts calls the tensor; where none is stated, the first group of the
 * expression.
 */
const ENDINGS: readonly (readonly [RegExp, AdapterKind, part?: string | undefined, leaf?: Leaf])[] = [
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
  [/\.lora_B(?:\.default)?\.bias$/, 'LoRA', 'up_bias'],
  [/\.(reshape_weight)$/, 'LoRA'],
  [/\.(alpha|dora_scale)$/, 'any'],
  [/\.(hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2))$/, 'LoHa'],
  [/\.(lokr_(?:w1|w1_a|w1_b|w2|w2_a|w2_b|t2))$/, 'LoKr'],
  [/\.(a1|a2|b1|b2)\.weight$/, 'GLoRA'],
  [/\.(oft_blocks|rescale)$/, 'OFT/BOFT'],
  [/\.(diff|w_norm)$/, 'full difference'],
  [/\.(diff_b|b_norm)$/, 'full difference', undefined, 'bias'],
  [/\.(set_weight)$/, 'replaced tensor'],
  [/\.(lora_magnitude_vector)(?:\.default)?(?:\.weight)?$/, 'DoRA of PEFT'],
  [/\.(oft_diag|oft_R|boft_[RS])(?:\.default)?(?:\.weight)?$/, 'OFT of another form'],
  [/\.(bm1|bm2)\.weight$/, 'GLoRA with a core'],
  [/\.(on_input|ia3_l)(?:\.default)?$/, 'IA3'],
  [/\.(bias_(?:indices|values|size))$/, 'sparse bias'],
  [/\.lora_A(?:\.default)?\.(bias)$/, 'bias of a down projection'],
];

/** Beginnings of keys: what stands before a layer's name, and how that name is written. First match wins. */
const BEGINNINGS: readonly (readonly [RegExp, string, 'dots' | 'underscores'])[] = [
  [/^lora_unet_/, 'kohya', 'underscores'],
  [/^lycoris_/, 'lycoris', 'underscores'],
  [/^(?:base_model\.model\.)?(?:model\.)?diffusion_model\.(?:base_model\.model\.)?/, 'ldm', 'dots'],
  [/^(?:base_model\.model\.)?(?:unet\.)?(?:base_model\.model\.)?/, 'diffusers', 'dots'],
];

/** Names of the leaf modules as files write them, with dots and with underscores, LDM and diffusers alike. */
export interface TargetNames {
  readonly dots: ReadonlyMap<string, Part>;
  readonly underscores: ReadonlyMap<string, Part>;
}

export interface Key {
  readonly target: Part;
  readonly leaf: Leaf;
  readonly kind: AdapterKind;
  readonly part: string;
  readonly format: string;
}

/** Every name under which files address the leaf modules of a UNet. */
export function targetNames(config: UNetConfig): TargetNames {
  const spellings = [diffusersNames(config, 'add_embedding'), diffusersNames(config, 'class_embedding')];
  const dots = new Map<string, Part>();
  const underscores = new Map<string, Part>();
  for (const target of partsOf(config)) {
    for (const name of new Set([target.id, ...spellings.map((names) => names.get(target.id) ?? target.id)])) {
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

/** A key cut at its ending. */
export interface SplitKey {
  /** What stands before the ending. */
  readonly stem: string;
  readonly kind: AdapterKind;
  readonly part: string;
  readonly leaf: Leaf;
}

/** Null where no adapter kind has such an ending. */
export function splitKey(key: string): SplitKey | null {
  for (const [ending, kind, part, leaf = 'weight'] of ENDINGS) {
    const match = ending.exec(key);
    if (match) return { stem: key.slice(0, match.index), kind, part: part ?? match[1]!, leaf };
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
    const { kind, part, leaf } = split;
    const found = findTarget(names[style], split.stem.slice(match[0].length), leaf, format === 'ldm');
    if (found === undefined) return null;
    const isPeft = format === 'diffusers' && /\.lora_[AB](\.|$)/.test(key);
    return { ...found, kind, part, format: isPeft ? 'peft' : format };
  }
  return null;
}

/** An LDM name may also be that of a bias (`out.2.bias.diff`). A bias that the module does not have is nothing. */
function findTarget(
  names: ReadonlyMap<string, Part>,
  name: string,
  leaf: Leaf,
  isLdm: boolean,
): { readonly target: Part; readonly leaf: Leaf } | undefined {
  const ofBias = isLdm && leaf === 'weight' && name.endsWith('.bias');
  const target = names.get(ofBias ? name.slice(0, -'.bias'.length) : name);
  const owned = ofBias ? 'bias' : leaf;
  return target === undefined || (owned === 'bias' && !target.bias) ? undefined : { target, leaf: owned };
}

/** Whether a key belongs to a text encoder, which this program does not run. */
export function isTextEncoderKey(key: string): boolean {
  return /^(?:lora_te\d?_|(?:base_model\.model\.)?text_encoders?(?:_\d)?\.|lora_prior_te_)/.test(key);
}
