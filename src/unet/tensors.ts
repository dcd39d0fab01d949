/** What plans are drafted with: activations and layers' outputs as they lie, and where weights come from. Types and sizes only. */
import { alignTo, type Operand, type Virtual } from '../gpu/kernel.ts';
import type { Segments } from '../kernels/gemm.ts';
import type { Matrix } from './matmul.ts';

/** Channels as stored: padded with zeros to a multiple of 8. */
export const storedChannels = (channels: number): number => alignTo(channels, 8);

/** Where a plan finds weights. Throws on a layer that does not exist. */
export interface WeightSource {
  matrix(id: string): Matrix;
  /** f32 values of a bias or norm parameter, padded to a multiple of 8; undefined where the layer has none. */
  vector(name: string): Operand | undefined;
  /** The layers of a bundle as one matrix, and their biases in one vector; undefined where they do not lie side by side. */
  bundle(id: string): BundledLayers | undefined;
}

export interface BundledLayers {
  readonly matrix: Matrix;
  readonly bias: Operand | undefined;
}

/** The output of one layer of a bundle. */
export interface Columns {
  readonly tensor: Virtual;
  readonly segments?: Segments;
}

/** Activations [images, height * width, channels], channels as stored. */
export interface Activation {
  readonly tensor: Virtual;
  readonly channels: number;
  readonly height: number;
  readonly width: number;
}

export const tokensOf = ({ height, width }: Activation): number => height * width;

/** A tensor that layers with LoRA slots read. */
export interface LayerInput {
  /** Of the layers that read it; the kernels find the low-rank terms of all of them at the first one. */
  readonly slots: readonly number[];
  /** Rows per image that these layers compute. */
  readonly rows: number;
}
