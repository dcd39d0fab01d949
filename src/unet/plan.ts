/**
 * The forward pass of a UNet as a plan: which layer reads what, in which order. Follows the reference implementation's
 * `openaimodel.UNetModel` (Rombach et al. 2022, "latent-diffusion"). Pure: no GPU call, no weights' values.
 */
import type { Virtual } from '../gpu/kernel.ts';
import type { PlanSpec } from '../gpu/plan.ts';
import { toNchwOf } from '../kernels/elementwise.ts';
import type { UNetConfig, UNetModule } from './config.ts';
import { Draft, type DraftOptions } from './draft.ts';
import { type Activation, type Columns, type LayerInput, storedChannels, tokensOf } from './tensors.ts';

type Res = Extract<UNetModule, { kind: 'res' }>;
type Transformer = Extract<UNetModule, { kind: 'transformer' }>;

/** Which control residuals come with a request: entry `length - 1 - b` belongs to block b, as in the reference's lists. */
export interface ControlPattern {
  readonly input?: readonly boolean[];
  readonly middle?: readonly boolean[];
  readonly output?: readonly boolean[];
}

/** Everything a plan depends on besides the model. */
export interface UNetShape {
  readonly images: number;
  /** Latent pixels. */
  readonly height: number;
  readonly width: number;
  readonly contextTokens: number;
  readonly control: ControlPattern;
}

/** The tensors of a run. All feeds hold values of the storage dtype; `x` and residuals in NCHW. */
export interface UNetPlan {
  readonly spec: PlanSpec;
  readonly feeds: {
    readonly x: Virtual;
    /** Sinusoidal embedding of the timesteps, [images, modelChannels]. */
    readonly time: Virtual;
    /** [images, contextTokens, stored contextDim] */
    readonly context: Virtual;
    /** [images, stored admChannels] */
    readonly y: Virtual | undefined;
    /** By name, e.g. `output.3`, the index being the position in the list. */
    readonly control: ReadonlyMap<string, Virtual>;
  };
  /** [images, outChannels, height, width] in f32. */
  readonly out: Virtual;
  /** Outputs by LDM path: modules (`input_blocks.1.0`), blocks (`input_blocks.1`, `middle_block`), and `emb` after its SiLU. */
  readonly points: ReadonlyMap<string, Activation>;
  /** What the layers that a LoRA can address read. */
  readonly inputs: readonly LayerInput[];
}

const RES_EPS = 1e-5;
const TRANSFORMER_EPS = 1e-6;

/** `capture` keeps the output of every block until the end of the run, for comparing with a reference. */
export function planUNet(
  config: UNetConfig,
  shape: UNetShape,
  options: Omit<DraftOptions, 'images'> & { readonly capture?: boolean },
): UNetPlan {
  return new UNetDrafter(config, shape, options).plan(options.capture ?? false);
}

class UNetDrafter {
  readonly #config: UNetConfig;
  readonly #shape: UNetShape;
  readonly #draft: Draft;
  readonly #points = new Map<string, Activation>();
  readonly #control = new Map<string, Virtual>();
  readonly #context: Virtual;
  /** What every ResBlock adds of the time (and label) embedding, by its layer. */
  #embeddings: ReadonlyMap<string, Columns> = new Map();

  constructor(config: UNetConfig, shape: UNetShape, options: Omit<DraftOptions, 'images'>) {
    this.#config = config;
    this.#shape = shape;
    this.#draft = new Draft({ ...options, images: shape.images });
    const { images, contextTokens } = shape;
    this.#context = this.#draft.tensor('context', images * contextTokens * storedChannels(config.contextDim));
  }

  plan(capture: boolean): UNetPlan {
    const { images, height, width } = this.#shape;
    const draft = this.#draft;
    const { inChannels, outChannels } = this.#config;
    const x = draft.tensor('x', images * inChannels * height * width);
    const { time, y } = this.#embed();
    let h = draft.fromNchw('x', x, inChannels, height, width);
    h = this.#blocks(h);
    h = draft.conv3('out.2', draft.groupNorm('out.0', h, RES_EPS, true), { wide: true });
    const out = draft.bytes('out', images * outChannels * height * width * 4);
    const tokens = tokensOf(h);
    draft.always(
      toNchwOf({
        label: 'out',
        images,
        tokens,
        channels: outChannels,
        storedChannels: h.channels,
        x: h.tensor,
        out,
      }),
    );
    const captured = capture ? [...this.#points.values()].map((point) => point.tensor) : [];
    const feeds = [x, time, this.#context, ...(y ? [y] : []), ...this.#control.values()];
    return {
      spec: {
        label: `unet ${images}x${height}x${width}`,
        storage: draft.storage,
        steps: draft.steps,
        feeds,
        results: [out, ...captured],
      },
      feeds: { x, time, context: this.#context, y, control: this.#control },
      out,
      points: this.#points,
      inputs: draft.inputs,
    };
  }

  #embed(): { time: Virtual; y: Virtual | undefined } {
    const draft = this.#draft;
    const { images } = this.#shape;
    const { modelChannels, timeEmbedDim, admChannels } = this.#config;
    const time = draft.tensor('time', images * modelChannels);
    let y: Virtual | undefined;
    let label: Virtual | undefined;
    if (admChannels !== null) {
      y = draft.tensor('y', images * storedChannels(admChannels));
      label = draft.layer('label_emb.0.2', draft.layer('label_emb.0.0', y, 1, { silu: true }), 1);
    }
    const hidden = draft.layer('time_embed.0', time, 1, { silu: true });
    const emb = draft.layer('time_embed.2', hidden, 1, { add: label, silu: true });
    this.#points.set('emb', { tensor: emb, channels: timeEmbedDim, height: 1, width: 1 });
    const { input, middle, output } = this.#config;
    const blocks = [...input.flat(), ...middle, ...output.flat()].filter(({ kind }) => kind === 'res');
    const projections = blocks.map(({ id }) => [`${id}.emb_layers.1`] as const);
    this.#embeddings = draft.bundle('emb_layers', projections, emb, 1);
    return { time, y };
  }

  #blocks(x: Activation): Activation {
    const { input, middle, output } = this.#config;
    const skips: Activation[] = [];
    let h = x;
    input.forEach((block, i) => {
      for (const module of block) h = this.#module(module, h);
      h = this.#residual('input', i, h);
      this.#points.set(`input_blocks.${i}`, h);
      skips.push(h);
    });
    for (const module of middle) h = this.#module(module, h);
    h = this.#residual('middle', 0, h);
    // Without a middle block (KOALA-700M) the first skip is `h` itself.
    if (h.tensor === skips.at(-1)?.tensor) h = this.#draft.copy('middle_block', h);
    this.#points.set('middle_block', h);
    output.forEach((block, i) => {
      const popped = skips.pop();
      if (!popped) throw new Error(`output_blocks.${i} has no skip`);
      const skip = this.#residual('output', i, popped);
      const next = skips.at(-1);
      block.forEach((module, j) => {
        h = this.#module(module, h, j === 0 ? skip : undefined, next);
      });
      this.#points.set(`output_blocks.${i}`, h);
    });
    return h;
  }

  /** `h` plus the control residual of block b, where the request has one. */
  #residual(list: 'input' | 'middle' | 'output', b: number, h: Activation): Activation {
    const pattern = this.#shape.control[list] ?? [];
    const index = pattern.length - 1 - b;
    if (!pattern[index]) return h;
    const name = `${list}.${index}`;
    const src = this.#draft.tensor(`control.${name}`, this.#shape.images * tokensOf(h) * h.channels);
    this.#control.set(name, src);
    return this.#draft.fromNchw(`control.${name}`, src, h.channels, h.height, h.width, h);
  }

  #module(module: UNetModule, h: Activation, skip?: Activation, next?: Activation): Activation {
    const out = this.#compute(module, h, skip, next);
    this.#points.set(module.id, out);
    return out;
  }

  /** `skip` is concatenated behind `h` (first module of an output block); `next` gives the size to upsample to. */
  #compute(module: UNetModule, h: Activation, skip?: Activation, next?: Activation): Activation {
    switch (module.kind) {
      case 'conv':
        return this.#draft.conv3(module.id, h, { wide: true });
      case 'res':
        return this.#res(module, h, skip);
      case 'transformer':
        return this.#transformer(module, h);
      case 'down':
        return this.#draft.conv3(`${module.id}.op`, h, { stride: 2, wide: true });
      case 'up': {
        const scaleTo = next ? ([next.height, next.width] as const) : ([h.height * 2, h.width * 2] as const);
        return this.#draft.conv3(`${module.id}.conv`, h, { scaleTo, wide: true });
      }
    }
  }

  #res({ id, inChannels, outChannels }: Res, x: Activation, skip: Activation | undefined): Activation {
    const draft = this.#draft;
    const normed = draft.groupNorm(`${id}.in_layers.0`, x, RES_EPS, true, skip);
    const { tensor: add, segments: addSegments } = this.#embeddings.get(`${id}.emb_layers.1`)!;
    const hidden = draft.conv3(`${id}.in_layers.2`, normed, { add, addSegments, addPerImage: true });
    let straight = x.tensor;
    if (inChannels !== outChannels) {
      const rows = skip
        ? ({ kind: 'concat', x2: skip.tensor, splitChannels: x.channels } as const)
        : ({ kind: 'linear' } as const);
      straight = draft.layer(`${id}.skip_connection`, x.tensor, tokensOf(x), { rows, wide: true });
    } else if (skip) throw new Error(`${id} concatenates a skip but has no skip_connection`);
    const h = draft.groupNorm(`${id}.out_layers.0`, hidden, RES_EPS, true);
    return draft.conv3(`${id}.out_layers.3`, h, { add: straight, wide: true });
  }

  #transformer(module: Transformer, x: Activation): Activation {
    const { id, depth } = module;
    const draft = this.#draft;
    const tokens = tokensOf(x);
    const like = (tensor: Virtual): Activation => ({ ...x, tensor });
    const input = draft.groupNorm(`${id}.norm`, x, TRANSFORMER_EPS, false).tensor;
    let h = like(draft.layer(`${id}.proj_in`, input, tokens, { wide: true }));
    const blocks = Array.from({ length: depth }, (_, i) => `${id}.transformer_blocks.${i}`);
    const { contextTokens } = this.#shape;
    // Nothing of the image is in the keys and values of the cross-attentions: those of all blocks are made at once.
    const cross = draft.bundle(
      `${id}.attn2`,
      blocks.map((block) => [`${block}.attn2.to_k`, `${block}.attn2.to_v`] as const),
      this.#context,
      contextTokens,
    );
    for (const block of blocks) {
      const [attn1, attn2] = [`${block}.attn1`, `${block}.attn2`];
      const normed = draft.layerNorm(`${block}.norm1`, h).tensor;
      const own = draft.bundle(attn1, [[`${attn1}.to_q`, `${attn1}.to_k`, `${attn1}.to_v`]], normed, tokens);
      h = like(this.#attend(module, attn1, h, own.get(`${attn1}.to_q`)!.tensor, own, tokens));
      const queries = draft.layer(`${attn2}.to_q`, draft.layerNorm(`${block}.norm2`, h).tensor, tokens);
      h = like(this.#attend(module, attn2, h, queries, cross, contextTokens));
      const inner = draft.layerNorm(`${block}.norm3`, h).tensor;
      const gated = draft.geglu(`${block}.ff.net.0.proj`, inner, tokens);
      h = like(draft.layer(`${block}.ff.net.2`, gated, tokens, { add: h.tensor, wide: true }));
    }
    return like(draft.layer(`${id}.proj_out`, h.tensor, tokens, { add: x.tensor, wide: true }));
  }

  /** residual + to_out(attention(q, k, v)), k and v among `layers`. */
  #attend(
    { heads, headDim }: Transformer,
    id: string,
    residual: Activation,
    q: Virtual,
    layers: ReadonlyMap<string, Columns>,
    keys: number,
  ): Virtual {
    const draft = this.#draft;
    const queries = tokensOf(residual);
    const [k, v] = [layers.get(`${id}.to_k`)!.tensor, layers.get(`${id}.to_v`)!.tensor];
    const attended = draft.attention(id, { heads, headDim, queries, keys }, q, k, v);
    return draft.layer(`${id}.to_out.0`, attended, queries, { add: residual.tensor, wide: true });
  }
}

/**
 * Sinusoidal embedding of timesteps, [count, dim]: cosines then sines of t * 10000^(-i / (dim / 2)) (Vaswani et al. 2017,
 * in the order latent-diffusion uses). On the CPU in f64: a few hundred numbers, and shader cosines of large angles are
 * allowed to be coarse.
 */
export function timestepEmbedding(timesteps: Float32Array, dim: number): Float32Array {
  const half = Math.floor(dim / 2);
  const out = new Float32Array(timesteps.length * dim);
  timesteps.forEach((t, n) => {
    for (let i = 0; i < half; i++) {
      // Frequency and angle are rounded to f32 as the reference does; at t = 999 that moves the angle by 3e-5.
      const angle = Math.fround(t * Math.fround(Math.exp((-Math.log(10000) * i) / half)));
      out[n * dim + i] = Math.cos(angle);
      out[n * dim + half + i] = Math.sin(angle);
    }
  });
  return out;
}
