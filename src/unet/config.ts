/**
 * What a UNet is made of: a plain description detected from the names and shapes of its tensors (LDM names, prefix
 * stripped), never from a version switch. Holds no weights and knows no files.
 */

/** One module of a block. `id` is its LDM path, e.g. `input_blocks.1.1`; the keys of its tensors start with it. */
export type UNetModule =
  | { readonly kind: 'conv'; readonly id: string; readonly inChannels: number; readonly outChannels: number }
  | { readonly kind: 'res'; readonly id: string; readonly inChannels: number; readonly outChannels: number }
  | {
      readonly kind: 'transformer';
      readonly id: string;
      readonly channels: number;
      readonly depth: number;
      readonly heads: number;
      readonly headDim: number;
      readonly contextDim: number;
      /** proj_in and proj_out are linear layers (SD 2.x, SDXL) rather than 1x1 convolutions (SD 1.x). */
      readonly linearProjection: boolean;
    }
  /** Stride-2 3x3 convolution, padding 1. */
  | { readonly kind: 'down'; readonly id: string; readonly channels: number }
  /** Nearest upsample to the size of the next skip, then a 3x3 convolution. */
  | { readonly kind: 'up'; readonly id: string; readonly channels: number };

export interface UNetConfig {
  readonly inChannels: number;
  readonly outChannels: number;
  readonly modelChannels: number;
  readonly timeEmbedDim: number;
  readonly contextDim: number;
  /** Width of the vector conditioning `y`, or null where the model has no label embedding. */
  readonly admChannels: number | null;
  /** input_blocks.I as lists of modules; the output of each is a skip. */
  readonly input: readonly (readonly UNetModule[])[];
  readonly middle: readonly UNetModule[];
  /** output_blocks.I; each starts by concatenating the matching skip behind its input. */
  readonly output: readonly (readonly UNetModule[])[];
}

/** A matrix-shaped layer that a LoRA can address. Conv weights are [out, in, kernel, kernel]. */
export interface Layer {
  /** LDM path without `.weight`, e.g. `input_blocks.1.1.transformer_blocks.0.attn1.to_q`. */
  readonly id: string;
  readonly kind: 'linear' | 'conv';
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** 1 or 3 (1 for linear). */
  readonly kernel: number;
}
