/**
 * Collects the dispatches of a plan, layer by layer: allocates virtual tensors, splits weights that exceed a binding,
 * and notes what the layers that a LoRA can address read. Knows layers and their weights, not the order of a UNet.
 */
import {
  alignTo,
  type Capabilities,
  type Dispatch,
  type Operand,
  type Storage,
  storageBytes,
  type Virtual,
} from '../gpu/kernel.ts';
import type { Step } from '../gpu/plan.ts';
import { type AttentionArgs, attentionOf } from '../kernels/attention.ts';
import { copyOf, fromNchwOf, gegluOf } from '../kernels/elementwise.ts';
import type { Segments } from '../kernels/epilogue.ts';
import type { GemmChoice, LoraOperands, Rows } from '../kernels/gemm.ts';
import { groupNormOf, layerNormOf, momentsBytes } from '../kernels/norm.ts';
import { PANEL } from '../kernels/panel.ts';
import { gemmChoice, partialsOf } from '../kernels/split_k.ts';
import { firstReader } from './layers.ts';
import { bundleStep, type Matmul, matmulOf, segmentsOf, stepsOf } from './matmul.ts';
import {
  type Activation,
  type BundledLayers,
  type Columns,
  convolved,
  type LayerInput,
  storedChannels,
  tokensOf,
  type WeightSource,
} from './tensors.ts';

export interface DraftOptions {
  readonly images: number;
  readonly storage: Storage;
  readonly capabilities: Capabilities;
  readonly weights: WeightSource;
  /** Operands of a slot's low-rank terms, or undefined for a plan without any. */
  readonly lora: ((slot: number) => LoraOperands) | undefined;
  /** How a layer's GEMM is computed, where not as the rules say. */
  readonly choose?: typeof gemmChoice;
}

interface LayerOptions {
  readonly rows?: Rows;
  readonly add?: Virtual | undefined;
  readonly addPerImage?: boolean;
  readonly addSegments?: Segments | undefined;
  readonly silu?: boolean;
  /** The result is part of the residual stream and kept in f32. */
  readonly wide?: boolean;
}

interface ConvOptions {
  readonly stride?: 1 | 2;
  readonly scaleTo?: readonly [number, number];
}

interface MatmulOptions extends LayerOptions {
  readonly gated?: boolean;
  readonly choice?: GemmChoice | undefined;
  readonly out?: Virtual | undefined;
  readonly segments?: Segments | undefined;
}

interface Multiplied {
  readonly matmul: Matmul;
  readonly out: Virtual;
}

/** The outputs of layers as ranges of one tensor, by layer. */
interface Segmented {
  readonly tensor: Virtual | undefined;
  readonly segments: Segments | undefined;
  readonly ranges: ReadonlyMap<string, Virtual>;
}

const NOT_BUNDLED: Segmented = { tensor: undefined, segments: undefined, ranges: new Map() };

/** Layers that share a down projection. */
type Group = readonly [string, ...string[]];

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

  /**
   * The linear layers of a bundle, all of which read `x`, by id. Those of a group share a down projection of their low-rank
   * terms.
   */
  bundle(id: string, groups: readonly Group[], x: Virtual, m: number): ReadonlyMap<string, Columns> {
    for (const [first, ...others] of groups)
      for (const other of others)
        if (firstReader(other) !== first) throw new Error(`${other} does not read what ${first} reads`);
    const ids = groups.flat();
    const whole = this.#options.weights.bundle(id);
    const { tensor, segments, ranges } = whole ? this.#segmented(id, ids, m) : NOT_BUNDLED;
    const together = whole && this.#multiply(id, whole, x, m, { segments, out: tensor });
    // The same choice for them all: whether a batch runs them together or apart changes no image's sums.
    const choice = together?.matmul.parts[0]?.choice;
    const outs = new Map<string, Columns>();
    const matmul = (one: string): Matmul => {
      const { matmul, out } = this.#matmul(one, x, m, { segments, out: ranges.get(one), choice });
      outs.set(one, { tensor: out, segments });
      return matmul;
    };
    const apart = groups.flatMap(([first, ...others]) =>
      this.#stepsOf([matmul(first), ...others.map(matmul)], m),
    );
    if (together) this.steps.push(bundleStep(together.matmul, ids, apart, this.#options.capabilities));
    else this.steps.push(...apart);
    return outs;
  }

  /** One tensor for the outputs of layers, in segments, and its ranges. */
  #segmented(id: string, ids: readonly string[], m: number): Segmented {
    const { capabilities, weights } = this.#options;
    const widths = ids.map((one) => weights.matrix(one).outFeatures);
    const { segments, ranges, sizeBytes } = segmentsOf(widths, this.images * m, this.storage, capabilities);
    const tensor = this.bytes(id, sizeBytes);
    const outs = ids.map((one, i) => {
      const { offset, sizeBytes } = ranges[i]!;
      return [one, { ...this.bytes(one, sizeBytes), within: { tensor, offset } }] as const;
    });
    return { tensor, segments, ranges: new Map(outs) };
  }

  #push(matmuls: readonly [Matmul, ...Matmul[]], rows: number): void {
    this.steps.push(...this.#stepsOf(matmuls, rows));
  }

  #stepsOf(matmuls: readonly [Matmul, ...Matmul[]], rows: number): readonly Step[] {
    const { capabilities, lora } = this.#options;
    if (lora) this.inputs.push({ slots: matmuls.map(({ slot }) => slot), rows });
    return stepsOf(matmuls, capabilities, lora);
  }

  #matmul(id: string, x: Virtual, m: number, options: MatmulOptions = {}): Multiplied {
    const { weights } = this.#options;
    const layer = { matrix: weights.matrix(id), bias: weights.vector(`${id}.bias`) };
    return this.#multiply(id, layer, x, m, options);
  }

  #multiply(
    label: string,
    { matrix, bias }: BundledLayers,
    x: Virtual,
    m: number,
    { rows = { kind: 'linear' }, wide, out: given, choice: chosen, ...epilogue }: MatmulOptions,
  ): Multiplied {
    const { images } = this;
    const { capabilities, choose = gemmChoice } = this.#options;
    const channels = storedChannels(matrix.inFeatures);
    const n = storedChannels(epilogue.gated ? matrix.outFeatures / 2 : matrix.outFeatures);
    const sizes = { images, m, n, channels, rows, ...epilogue };
    const choice = chosen ?? choose({ ...sizes, format: matrix.format }, capabilities);
    const sums = partialsOf(sizes, choice);
    const partials = choice.splits > 1 ? this.tensor(`${label} partials`, sums, true) : undefined;
    const out = given ?? this.tensor(label, images * m * n, wide);
    const args = { label, ...sizes, x, out, bias, choice, partials };
    return { matmul: matmulOf(matrix, args, capabilities), out };
  }

  /** A 3x3 convolution to height x width; `scaleTo` is the size the convolution sees (nearest upsample) if not x's own. */
  conv3(
    id: string,
    x: Activation,
    { stride, scaleTo, ...options }: ConvOptions & Omit<LayerOptions, 'rows'> = {},
  ): Activation {
    const { rows, height, width } = convolved(x, stride, scaleTo);
    const tensor = this.layer(id, x.tensor, height * width, { rows, ...options });
    const channels = storedChannels(this.#options.weights.matrix(id).outFeatures);
    return { tensor, channels, height, width };
  }

  /** Group norm over the channels of `x`, and of `x2` behind them, into one tensor. */
  groupNorm(id: string, x: Activation, eps: number, silu: boolean, x2?: Activation): Activation {
    const channels = x.channels + (x2?.channels ?? 0);
    const tokens = tokensOf(x);
    const { capabilities } = this.#options;
    const sizeBytes = momentsBytes(this.images, tokens, channels, capabilities);
    const out = this.activation(id, channels, x.height, x.width);
    const args = {
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
      moments: this.bytes(`${id} moments`, sizeBytes),
      out: out.tensor,
    };
    this.always(...groupNormOf(args, capabilities));
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
      storage: this.storage,
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
    shape: Pick<AttentionArgs, 'heads' | 'headDim' | 'queries' | 'keys'>,
    q: Virtual,
    k: Virtual,
    v: Virtual,
  ): Virtual {
    const { images, storage } = this;
    const out = this.tensor(id, images * shape.queries * shape.heads * shape.headDim);
    const args = { label: id, images, storage, ...shape, q, k, v, out };
    this.always(attentionOf(args, this.#options.capabilities));
    return out;
  }

  /** The values of a linear layer times the GELU of its gates: `m` rows of `x` -> [images, m, outFeatures / 2]. */
  geglu(id: string, x: Virtual, m: number): Virtual {
    const inner = this.#options.weights.matrix(id).outFeatures / 2;
    const { matmul, out } = this.#matmul(id, x, m, { gated: true });
    // Values and gates must be bound together, each in whole panels.
    if (matmul.parts.length === 1 && inner % PANEL === 0) this.#push([matmul], m);
    else {
      const both = this.layer(id, x, m);
      this.always(gegluOf({ label: id, rows: this.images * m, inner, x: both, out }));
    }
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
