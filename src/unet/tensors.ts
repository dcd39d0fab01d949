/**
 * What plans are drafted with: activations and layers' outputs as they lie, and where weights come from. Types and
 * arithmetic.
 */
import { alignTo, ceilDiv, type Operand, type Virtual } from '../gpu/kernel.ts';
import type { Segments } from '../kernels/epilogue.ts';
import type { Rows } from '../kernels/gemm.ts';
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
  readonly segments: Segments | undefined;
}

/** Activations [images, height * width, channels], channels as stored. */
export interface Activation {
  readonly tensor: Virtual;
  readonly channels: number;
  readonly height: number;
  readonly width: number;
}

/** How a 3x3 convolution of padding 1 reads `x`, and the size of what it makes; `scaleTo` is the size that it sees. */
export function convolved(
  x: Activation,
  stride: 1 | 2 = 1,
  [inHeight, inWidth]: readonly [number, number] = [x.height, x.width],
): { readonly rows: Rows; readonly height: number; readonly width: number } {
  const height = ceilDiv(inHeight, stride);
  const width = ceilDiv(inWidth, stride);
  const { height: srcHeight, width: srcWidth } = x;
  const rows = { kind: 'conv3', srcHeight, srcWidth, inHeight, inWidth, outWidth: width, stride } as const;
  return { rows, height, width };
}

export const tokensOf = ({ height, width }: Activation): number => height * width;

/** A tensor that layers with LoRA slots read. */
export interface LayerInput {
  /** Of the layers that read it; the kernels find the low-rank terms of all of them at the first one. */
  readonly slots: readonly number[];
  /** Rows per image that these layers compute. */
  readonly rows: number;
}
