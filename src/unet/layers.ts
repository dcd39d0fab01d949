/**
 * The tensors that a UNet of a given config is made of, by LDM name: what detection validates, loading uploads and LoRA
 * addresses. Names and shapes only; the order of computation is blocks.ts.
 */
import type { Layer, UNetConfig, UNetModule } from './config.ts';

/** A leaf module with weights. Norms have a weight and a bias of [outFeatures]. */
export interface Part extends Omit<Layer, 'kind'> {
  readonly kind: 'linear' | 'conv' | 'norm' | 'group_norm';
  readonly bias: boolean;
}

function linear(id: string, inFeatures: number, outFeatures: number, bias = true): Part {
  return { id, kind: 'linear', inFeatures, outFeatures, kernel: 1, bias };
}

function conv(id: string, inFeatures: number, outFeatures: number, kernel: number): Part {
  return { id, kind: 'conv', inFeatures, outFeatures, kernel, bias: true };
}

function norm(id: string, features: number, kind: 'norm' | 'group_norm' = 'group_norm'): Part {
  return { id, kind, inFeatures: features, outFeatures: features, kernel: 1, bias: true };
}

function attention(id: string, channels: number, contextDim: number): readonly Part[] {
  return [
    linear(`${id}.to_q`, channels, channels, false),
    linear(`${id}.to_k`, contextDim, channels, false),
    linear(`${id}.to_v`, contextDim, channels, false),
    linear(`${id}.to_out.0`, channels, channels),
  ];
}

function transformerBlock(id: string, channels: number, contextDim: number): readonly Part[] {
  return [
    norm(`${id}.norm1`, channels, 'norm'),
    ...attention(`${id}.attn1`, channels, channels),
    norm(`${id}.norm2`, channels, 'norm'),
    ...attention(`${id}.attn2`, channels, contextDim),
    norm(`${id}.norm3`, channels, 'norm'),
    // GEGLU: value and gate halves of 4 * channels each.
    linear(`${id}.ff.net.0.proj`, channels, channels * 8),
    linear(`${id}.ff.net.2`, channels * 4, channels),
  ];
}

/** The leaf modules of one module, in the order of computation. `timeEmbedDim` is the width of the time embedding. */
export function partsOfModule(module: UNetModule, timeEmbedDim: number): readonly Part[] {
  const { id } = module;
  switch (module.kind) {
    case 'conv':
      return [conv(id, module.inChannels, module.outChannels, 3)];
    case 'res': {
      const { inChannels, outChannels } = module;
      const skip =
        inChannels === outChannels ? [] : [conv(`${id}.skip_connection`, inChannels, outChannels, 1)];
      return [
        norm(`${id}.in_layers.0`, inChannels),
        conv(`${id}.in_layers.2`, inChannels, outChannels, 3),
        linear(`${id}.emb_layers.1`, timeEmbedDim, outChannels),
        norm(`${id}.out_layers.0`, outChannels),
        conv(`${id}.out_layers.3`, outChannels, outChannels, 3),
        ...skip,
      ];
    }
    case 'transformer': {
      const { channels, depth, contextDim } = module;
      const project = (name: string): Part =>
        module.linearProjection
          ? linear(`${id}.${name}`, channels, channels)
          : conv(`${id}.${name}`, channels, channels, 1);
      const blocks = Array.from({ length: depth }, (_, block) =>
        transformerBlock(`${id}.transformer_blocks.${block}`, channels, contextDim),
      );
      return [norm(`${id}.norm`, channels), project('proj_in'), ...blocks.flat(), project('proj_out')];
    }
    case 'down':
      return [conv(`${id}.op`, module.channels, module.channels, 3)];
    case 'up':
      return [conv(`${id}.conv`, module.channels, module.channels, 3)];
  }
}

/** Every leaf module of the UNet, input to output. */
export function partsOf(config: UNetConfig): readonly Part[] {
  const { modelChannels, timeEmbedDim, admChannels, outChannels } = config;
  const label =
    admChannels === null
      ? []
      : [
          linear('label_emb.0.0', admChannels, timeEmbedDim),
          linear('label_emb.0.2', timeEmbedDim, timeEmbedDim),
        ];
  const modules = [...config.input.flat(), ...config.middle, ...config.output.flat()];
  return [
    linear('time_embed.0', modelChannels, timeEmbedDim),
    linear('time_embed.2', timeEmbedDim, timeEmbedDim),
    ...label,
    ...modules.flatMap((module) => partsOfModule(module, timeEmbedDim)),
    norm('out.0', modelChannels),
    conv('out.2', modelChannels, outChannels, 3),
  ];
}

/** Every linear and convolution layer: what a LoRA can address. */
export function layersOf(config: UNetConfig): readonly Layer[] {
  const layers: Layer[] = [];
  for (const { id, kind, inFeatures, outFeatures, kernel } of partsOf(config)) {
    if (kind === 'linear' || kind === 'conv') layers.push({ id, kind, inFeatures, outFeatures, kernel });
  }
  return layers;
}

/** Linear layers that read one tensor: their weights lie side by side on the GPU, as the rows of one matrix. */
export interface Bundle {
  /** LDM path of what holds them: `….transformer_blocks.0.attn1`, a transformer's `….attn2`, `emb_layers` of all blocks. */
  readonly id: string;
  readonly parts: readonly Part[];
}

/** The bundle that a layer belongs to, if any: q, k and v; k and v of a transformer's cross-attentions; the time projections. */
const BUNDLES: readonly (readonly [layer: RegExp, bundle: string])[] = [
  [/\.attn1\.to_[qkv]$/, '.attn1'],
  [/\.transformer_blocks\.\d+\.attn2\.to_[kv]$/, '.attn2'],
  [/^.*\.emb_layers\.1$/, 'emb_layers'],
];

/** Bundles of whole panels of `columns`; what does not fill them stays by itself. */
export function bundlesOf(config: UNetConfig, columns: number): readonly Bundle[] {
  const bundles = new Map<string, Part[]>();
  for (const part of partsOf(config)) {
    const [layer, bundle] = BUNDLES.find(([pattern]) => pattern.test(part.id)) ?? [];
    if (!layer || !bundle) continue;
    const id = part.id.replace(layer, bundle);
    bundles.set(id, [...(bundles.get(id) ?? []), part]);
  }
  return [...bundles]
    .map(([id, parts]) => ({ id, parts }))
    .filter(({ parts }) => parts.length > 1 && parts.every(({ outFeatures }) => outFeatures % columns === 0));
}

/**
 * The first of the layers that read the same tensor as this one: q, k and v of self-attention, k and v of cross-attention.
 * Every other layer stands alone.
 */
export function firstReader(id: string): string {
  return id.replace(/\.attn1\.to_[kv]$/, '.attn1.to_q').replace(/\.attn2\.to_v$/, '.attn2.to_k');
}

/** Shape of a part's weight: linear [out, in], conv [out, in, kernel, kernel], norm [features]. */
export function weightShape({
  kind,
  inFeatures,
  outFeatures,
  kernel,
}: Omit<Part, 'id' | 'bias'>): readonly number[] {
  if (kind === 'linear') return [outFeatures, inFeatures];
  return kind === 'conv' ? [outFeatures, inFeatures, kernel, kernel] : [outFeatures];
}

/** LDM name -> shape of every tensor that a UNet of this config has, and of no other. */
export function tensorsOf(config: UNetConfig): ReadonlyMap<string, readonly number[]> {
  const tensors = new Map<string, readonly number[]>();
  for (const part of partsOf(config)) {
    tensors.set(`${part.id}.weight`, weightShape(part));
    if (part.bias) tensors.set(`${part.id}.bias`, [part.outFeatures]);
  }
  return tensors;
}
