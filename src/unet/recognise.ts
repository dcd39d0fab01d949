/**
 * What a file is that is not a UNet of this program, guessed from its tensor names so that the error can say it, and
 * which tensors forbid a plain reading of the weights beside them.
 */

/** First match wins, so the more special kinds stand first. Patterns see names as they are in the file. */
const LOOKS_LIKE: readonly (readonly [RegExp, string])[] = [
  [
    /\.(lora_(up|down|A|B|mid)\b|lora\.(up|down)|hada_|lokr_|oft_blocks|dora_scale)|_lora\.(up|down)/,
    'a LoRA adapter',
  ],
  [/(^|\.)(time_stack|time_mix_blocks|time_mixer|temporal_transformer_blocks)\./, 'a video UNet (SVD)'],
  [/(^|\.)motion_modules\./, 'an AnimateDiff motion module'],
  [/(^|\.)(input_hint_block|zero_convs|controlnet_cond_embedding|controlnet_down_blocks)\./, 'a ControlNet'],
  [/(^|\.)(double_blocks|single_transformer_blocks)\./, 'a DiT (Flux)'],
  [/(^|\.)joint_blocks\./, 'a DiT (SD 3)'],
  [/(^|\.)(double_layers|single_layers)\./, 'a DiT (AuraFlow)'],
  [/(^|\.)(clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper)\./, 'a Stable Cascade model'],
  [/(^|\.)(ip_adapter|image_proj)\./, 'an IP-Adapter'],
  [/(^|\.)adapter\.body\.|^body\.0\./, 'a T2I-Adapter'],
  [/^(model\.diffusion_model\.|diffusion_model\.|transformer\.)?(transformer_)?blocks\.\d+\./, 'a DiT'],
  [
    /^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|down|up|mid|down_blocks|up_blocks|mid_block)\./,
    'a VAE',
  ],
  [/(^|\.)(text_model\.encoder|transformer\.resblocks|encoder\.block|model\.layers)\./, 'a text encoder'],
  [/^(conv_first|RRDB_trunk|model\.0)\./, 'an image upscaler'],
  [/^(emb_params|clip_[lg]|string_to_param)\b/, 'a textual-inversion embedding'],
];

/** Tensors beside ordinary weights that change what those mean: without them every number would come out wrong. */
const ALTERS: readonly (readonly [RegExp, string])[] = [
  [/\.(scale_weight|weight_scale|scale_input|comfy_quant)$|(^|\.)scaled_fp8$/, 'scaled or quantised weights'],
  [/\.(absmax|quant_map|quant_state\..+|SCB|qweight|qzeros)$/, 'quantised weights'],
  [/(^|\.)(time_stack|time_mix_blocks|time_mixer|motion_modules)\./, 'video layers'],
];

/** "a VAE", "a DiT (Flux)" and so on, or null when no pattern matches. */
export function looksLike(names: Iterable<string>): string | null {
  let best = LOOKS_LIKE.length;
  for (const name of names) {
    for (let i = 0; i < best; i++) if (LOOKS_LIKE[i]![0].test(name)) best = i;
  }
  return LOOKS_LIKE[best]?.[1] ?? null;
}

/** The first tensor that a UNet of this program would have to use and cannot, and what it belongs to; or null. */
export function alteredBy(names: Iterable<string>): { readonly name: string; readonly what: string } | null {
  for (const name of names) {
    const what = ALTERS.find(([pattern]) => pattern.test(name))?.[1];
    if (what !== undefined) return { name, what };
  }
  return null;
}
