/**
 * Collects the dispatches of a plan, layer by layer: allocates virtual tensors, splits weights that exceed a binding,
 * and gives every addressable layer its low-rank form. Knows layers and their weights, not the order of a UNet.
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
import { type GemmArgs, gemmOf, type LoraOperands, loraDownOf, PANEL, type Rows } from '../kernels/gemm.ts';
import { groupNormOf, groupNormScratch, layerNormOf } from '../kernels/norm.ts';

/** Channels as stored: padded with zeros to a multiple of 8. */
export const storedChannels = (channels: number): number => alignTo(channels, 8);

/** A packed weight matrix: [panels][k][32] in the storage dtype, and its layer's LoRA slot. */
export interface Matrix {
  readonly slot: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly kernel: number;
  /** The bytes `offset .. offset + sizeBytes` of the packed matrix. */
  readonly range: (offset: number, sizeBytes: number) => Operand;
}

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
  /** Rows per image that each used slot's layer computes; sizes the scratch of the low-rank terms. */
  readonly slotRows: Map<number, number> = new Map<number, number>();
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
    const matrix = this.#options.weights.matrix(id);
    const n = storedChannels(matrix.outFeatures);
    const out = this.tensor(id, this.images * m * n, options.wide);
    const rows = options.rows ?? { kind: 'linear' };
    const args: Omit<GemmArgs, 'w'> = {
      label: id,
      images: this.images,
      m,
      channels: storedChannels(matrix.inFeatures),
      n,
      rows,
      x,
      out,
      bias: this.#options.weights.vector(`${id}.bias`),
      add: options.add,
      addPerImage: options.addPerImage,
      silu: options.silu,
    };
    this.#push(args, matrix);
    return out;
  }

  #push(args: Omit<GemmArgs, 'w'>, matrix: Matrix): void {
    const { capabilities, lora } = this.#options;
    const panelBytes = matrix.kernel ** 2 * args.channels * PANEL * storageBytes(this.storage);
    const panels = ceilDiv(matrix.outFeatures, PANEL);
    const most = Math.max(1, Math.floor(capabilities.maxBindingBytes / panelBytes));
    const parts: GemmArgs[] = [];
    for (let panel0 = 0; panel0 < panels; panel0 += most) {
      const count = Math.min(most, panels - panel0);
      const w = matrix.range(panel0 * panelBytes, count * panelBytes);
      parts.push({ ...args, w, panel0, panels: count });
    }
    const base = parts.map((part) => gemmOf(part, capabilities));
    if (!lora) {
      this.always(...base);
      return;
    }
    const operands = lora(matrix.slot);
    this.slotRows.set(matrix.slot, args.m);
    this.steps.push({
      kind: 'slot',
      slot: matrix.slot,
      base,
      down: loraDownOf({ ...args, w: parts[0]!.w }, capabilities, operands),
      main: parts.map((part) => gemmOf(part, capabilities, operands)),
    });
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
      rows: this.images * tokensOf(x),
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
