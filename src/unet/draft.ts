/**
 * Collects the dispatches of a plan, layer by layer: allocates virtual tensors, splits weights that exceed a binding,
 * and notes what the layers that a LoRA can address read. Knows layers and their weights, not the order of a UNet.
 */
import {
  alignTo,
  type Capabilities,
  ceilDiv,
  type Dispatch,
  type Operand,
  type Storage,
  storageBytes,
  type Virtual,
} from '../gpu/kernel.ts';
import type { Step } from '../gpu/plan.ts';
import { attentionOf } from '../kernels/attention.ts';
import { copyOf, fromNchwOf, gegluOf } from '../kernels/elementwise.ts';
import type { LoraOperands, Rows } from '../kernels/gemm.ts';
import { groupNormOf, groupNormScratch, layerNormOf } from '../kernels/norm.ts';
import { firstReader } from './layers.ts';
import { type Matmul, type Matrix, matmulOf, stepsOf } from './matmul.ts';

/** Channels as stored: padded with zeros to a multiple of 8. */
export const storedChannels = (channels: number): number => alignTo(channels, 8);

/** Where a plan finds weights. Throws on a layer that does not exist. */
export interface WeightSource {
  matrix(id: string): Matrix;
  /** f32 values of a bias or norm parameter, padded to a multiple of 8; undefined where the layer has none. */
  vector(name: string): Operand | undefined;
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

export interface DraftOptions {
  readonly images: number;
  readonly storage: Storage;
  readonly capabilities: Capabilities;
  readonly weights: WeightSource;
  /** Operands of a slot's low-rank terms, or undefined for a plan without any. */
  readonly lora: ((slot: number) => LoraOperands) | undefined;
}

interface LayerOptions {
  readonly rows?: Rows;
  readonly add?: Virtual | undefined;
  readonly addPerImage?: boolean;
  readonly silu?: boolean;
  /** The result is part of the residual stream and kept in f32. */
  readonly wide?: boolean;
}

export class Draft {
  readonly images: number;
  readonly storage: Storage;
  readonly steps: Step[] = [];
  /** Every slot once. */
  readonly inputs: LayerInput[] = [];
  readonly #options: DraftOptions;
  #ids = 0;

  constructor(options: DraftOptions) {
    this.#options = options;
    this.images = options.images;
    this.storage = options.storage;
  }

  /** A tensor of `count` values, stored, or f32 in any storage where `wide`. */
  tensor(label: string, count: number, wide = false): Virtual {
    const isWide = wide && this.storage !== 'f32';
    return this.#virtual(label, count * (isWide ? 4 : storageBytes(this.storage)), isWide);
  }

  bytes(label: string, sizeBytes: number): Virtual {
    return this.#virtual(label, sizeBytes, false);
  }

  #virtual(label: string, sizeBytes: number, wide: boolean): Virtual {
    return { kind: 'virtual', id: this.#ids++, label, sizeBytes: alignTo(sizeBytes, 16), wide };
  }

  activation(label: string, channels: number, height: number, width: number, wide = false): Activation {
    const tensor = this.tensor(label, this.images * height * width * channels, wide);
    return { tensor, channels, height, width };
  }

  always(...dispatches: readonly Dispatch[]): void {
    for (const dispatch of dispatches) this.steps.push({ kind: 'always', dispatch });
  }

  /** A linear layer or convolution: `m` rows per image of `x` -> [images, m, stored outFeatures]. */
  layer(id: string, x: Virtual, m: number, options: LayerOptions = {}): Virtual {
    const { matmul, out } = this.#matmul(id, x, m, options);
    this.#push([matmul], m);
    return out;
  }

  /** The linear layers that read `x`, which share a down projection of their low-rank terms. */
  layers(ids: readonly [string, ...string[]], x: Virtual, m: number): readonly Virtual[] {
    const stranger = ids.find((id) => firstReader(id) !== ids[0]);
    if (stranger) throw new Error(`${stranger} does not read what ${ids[0]} reads`);
    const [first, ...others] = ids;
    const all = [this.#matmul(first, x, m), ...others.map((id) => this.#matmul(id, x, m))] as const;
    this.#push([all[0].matmul, ...all.slice(1).map(({ matmul }) => matmul)], m);
    return all.map(({ out }) => out);
  }

  #push(matmuls: readonly [Matmul, ...Matmul[]], rows: number): void {
    const { capabilities, lora } = this.#options;
    this.steps.push(...stepsOf(matmuls, capabilities, lora));
    if (lora) this.inputs.push({ slots: matmuls.map(({ slot }) => slot), rows });
  }

  #matmul(
    id: string,
    x: Virtual,
    m: number,
    { rows = { kind: 'linear' }, wide, ...epilogue }: LayerOptions = {},
  ): { readonly matmul: Matmul; readonly out: Virtual } {
    const { capabilities, weights } = this.#options;
    const matrix = weights.matrix(id);
    const n = storedChannels(matrix.outFeatures);
    const out = this.tensor(id, this.images * m * n, wide);
    const args = {
      label: id,
      images: this.images,
      m,
      channels: storedChannels(matrix.inFeatures),
      n,
      rows,
      x,
      out,
      bias: weights.vector(`${id}.bias`),
      ...epilogue,
    };
    return { matmul: matmulOf(matrix, args, this.storage, capabilities), out };
  }

  /** A 3x3 convolution to height x width; `scaleTo` is the size the convolution sees (nearest upsample) if not x's own. */
  conv3(
    id: string,
    x: Activation,
    options: {
      stride?: 1 | 2;
      scaleTo?: readonly [number, number];
      add?: Virtual | undefined;
      addPerImage?: boolean;
      wide?: boolean;
    } = {},
  ): Activation {
    const stride = options.stride ?? 1;
    const [inHeight, inWidth] = options.scaleTo ?? [x.height, x.width];
    const height = ceilDiv(inHeight, stride);
    const width = ceilDiv(inWidth, stride);
    const { height: srcHeight, width: srcWidth } = x;
    const rows: Rows = {
      kind: 'conv3',
      srcHeight,
      srcWidth,
      inHeight,
      inWidth,
      outWidth: width,
      stride,
    };
    const { add, addPerImage = false, wide = false } = options;
    const tensor = this.layer(id, x.tensor, height * width, { rows, add, addPerImage, wide });
    const channels = storedChannels(this.#options.weights.matrix(id).outFeatures);
    return { tensor, channels, height, width };
  }

  /** Group norm over the channels of `x`, and of `x2` behind them, into one tensor. */
  groupNorm(id: string, x: Activation, eps: number, silu: boolean, x2?: Activation): Activation {
    const channels = x.channels + (x2?.channels ?? 0);
    const tokens = tokensOf(x);
    const scratch = groupNormScratch(this.images, tokens, channels);
    const out = this.activation(id, channels, x.height, x.width);
    this.always(
      ...groupNormOf({
        label: id,
        images: this.images,
        tokens,
        channels,
        eps,
        silu,
        x: x.tensor,
        x2: x2?.tensor,
        splitChannels: x.channels,
        gamma: this.#vector(`${id}.weight`),
        beta: this.#vector(`${id}.bias`),
        moments: this.bytes(`${id} moments`, scratch.momentsBytes),
        affine: this.bytes(`${id} affine`, scratch.affineBytes),
        out: out.tensor,
      }),
    );
    return out;
  }

  layerNorm(id: string, x: Activation): Activation {
    const out = this.activation(id, x.channels, x.height, x.width);
    const args = {
      label: id,
      images: this.images,
      rows: tokensOf(x),
      channels: x.channels,
      eps: 1e-5,
      x: x.tensor,
      gamma: this.#vector(`${id}.weight`),
      beta: this.#vector(`${id}.bias`),
      out: out.tensor,
    };
    this.always(layerNormOf(args, this.#options.capabilities));
    return out;
  }

  attention(
    id: string,
    heads: number,
    headDim: number,
    queries: number,
    keys: number,
    q: Virtual,
    k: Virtual,
    v: Virtual,
  ): Virtual {
    const out = this.tensor(id, this.images * queries * heads * headDim);
    const args = { label: id, images: this.images, heads, headDim, queries, keys, q, k, v, out };
    this.always(attentionOf(args, this.#options.capabilities));
    return out;
  }

  geglu(id: string, x: Virtual, tokens: number, inner: number): Virtual {
    const rows = this.images * tokens;
    const out = this.tensor(id, rows * inner);
    this.always(gegluOf({ label: id, rows, inner, x, out }));
    return out;
  }

  /** The same values in a tensor of their own: one tensor cannot be two operands of a dispatch. */
  copy(label: string, x: Activation): Activation {
    const out = this.activation(label, x.channels, x.height, x.width, x.tensor.wide);
    const count = this.images * tokensOf(x) * x.channels;
    this.always(copyOf({ label, count, x: x.tensor, out: out.tensor }));
    return out;
  }

  /** NCHW values of a feed as an activation; with `add`, summed into that one. */
  fromNchw(
    label: string,
    src: Virtual,
    channels: number,
    height: number,
    width: number,
    add?: Activation,
  ): Activation {
    const stored = storedChannels(channels);
    const out = this.activation(label, stored, height, width, add?.tensor.wide);
    const shape = { label, images: this.images, tokens: height * width, channels, storedChannels: stored };
    this.always(fromNchwOf({ ...shape, src, out: out.tensor, ...(add ? { add: add.tensor } : {}) }));
    return out;
  }

  #vector(name: string): Operand {
    const vector = this.#options.weights.vector(name);
    if (!vector) throw new Error(`the model has no vector ${name}`);
    return vector;
  }
}
