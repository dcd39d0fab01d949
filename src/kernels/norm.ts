/** Group norm (two steps: moments, apply) and layer norm. Formulas stand in `shaders/norm/`. */
import {
  alignTo,
  type Capabilities,
  ceilDiv,
  type Dispatch,
  defineKernel,
  type Kernel,
  type Operand,
  type Storage,
} from '../gpu/kernel.ts';
import { pick } from './pick.ts';

const source = {
  x: { type: 'array<Quad>', access: 'read_write' },
  x2: { type: 'array<Quad>', access: 'read_write', optional: true },
} as const;

/**
 * Workgroups of the two steps of a group norm, by variant: lanes by rows of invocations, and quads (`apply`: octets) of channels of
 * each. They own 160 and 320, or 64 and 64 channels, which divide those of every level and concatenation of SD 1.5 and SDXL.
 */
const LANES = { LANES: 8, ROWS: 1, COLUMNS: 5 };
const SHARED = { LANES: 8, ROWS: 32, COLUMNS: 2 };

/** A constant of a variant, as its module has it. */
const constantOf = ({ variants }: Kernel, variant: string, name: string): number =>
  Number(variants[variant]?.constants?.[name]);

export const groupMoments: Kernel = defineKernel({
  name: 'group_norm_moments',
  bindings: { ...source, moments: { type: 'array<vec4f>', access: 'read_write' } },
  params: { tokens: 'u32', quads: 'u32', split: 'u32', chunks: 'u32', chunkTokens: 'u32' },
  variants: {
    lanes: { files: ['norm/source.wgsl', 'norm/moments.wgsl'], constants: LANES, subgroupSize: 8 },
    shared: { files: ['norm/source.wgsl', 'norm/moments.wgsl'], constants: SHARED },
  },
});

export const groupApply: Kernel = defineKernel({
  name: 'group_norm_apply',
  bindings: {
    ...source,
    moments: { type: 'array<f32>', access: 'read_write' },
    gamma: { type: 'array<vec4f>', access: 'read' },
    beta: { type: 'array<vec4f>', access: 'read' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: {
    tokens: 'u32',
    quads: 'u32',
    split: 'u32',
    chunks: 'u32',
    chunkTokens: 'u32',
    groupChannels: 'u32',
    image0: 'u32',
    eps: 'f32',
  },
  constants: { SILU: false },
  variants: {
    lanes: {
      files: [
        'lib/lane_sum.wgsl',
        'norm/source.wgsl',
        'norm/fold.wgsl',
        'norm/fold_lanes.wgsl',
        'norm/apply.wgsl',
      ],
      constants: LANES,
      units: { out: 'octet' },
      subgroupSize: 8,
    },
    shared: {
      files: ['norm/source.wgsl', 'norm/fold.wgsl', 'norm/fold_shared.wgsl', 'norm/apply.wgsl'],
      constants: { ...SHARED, COLUMNS: 1 },
      units: { out: 'octet' },
    },
  },
});

export const layerNorm: Kernel = defineKernel({
  name: 'layer_norm',
  bindings: {
    x: { type: 'array<Quad>', access: 'read_write' },
    gamma: { type: 'array<vec4f>', access: 'read' },
    beta: { type: 'array<vec4f>', access: 'read' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: { rows: 'u32', quads: 'u32', image0: 'u32', eps: 'f32' },
  variants: {
    held: {
      files: ['lib/lane_sum.wgsl', 'norm/layer_norm_held.wgsl'],
      constants: { ROWS: 64 },
      units: { x: 'octet', out: 'octet' },
      subgroupSize: 8,
    },
    lanes: {
      files: ['lib/lane_sum.wgsl', 'norm/layer_norm_lanes.wgsl'],
      constants: { ROWS: 4 },
      subgroupSize: 8,
    },
    shared: { files: ['norm/layer_norm.wgsl'], constants: { ROWS: 4 } },
  },
});

/** Groups of every group norm of these UNets. */
export const GROUPS = 32;
/** Tokens of a chunk are a multiple of this. */
const CHUNK_TOKENS = 64;
/**
 * Chunks of an image at most, by variant: enough to occupy a GPU, or the cores of a CPU; few, as each workgroup of `apply` reads
 * the moments of all chunks.
 */
const MOST_CHUNKS: Readonly<Record<string, number>> = { lanes: 8, shared: 32 };

export interface Chunks {
  readonly variant: string;
  readonly chunks: number;
  readonly chunkTokens: number;
}

/** How a group norm cuts the tokens of an image. Both steps are of one variant: the moments lie as its chunks do. */
export function chunksOf(tokens: number, capabilities: Capabilities, forced?: string): Chunks {
  const { variant } = pick(groupMoments, capabilities, {}, forced).choice;
  const chunkTokens = alignTo(ceilDiv(tokens, MOST_CHUNKS[variant]!), CHUNK_TOKENS);
  return { variant, chunks: ceilDiv(tokens, chunkTokens), chunkTokens };
}

/** Bytes of a group norm's moments. */
export function momentsBytes(
  images: number,
  tokens: number,
  channels: number,
  capabilities: Capabilities,
): number {
  return images * chunksOf(tokens, capabilities).chunks * 2 * channels * 4;
}

export interface GroupNormArgs {
  readonly label: string;
  readonly images: number;
  readonly tokens: number;
  /** A multiple of 8 and of `groups` (32 unless told); with `x2`, of both tensors together. */
  readonly channels: number;
  readonly groups?: number;
  readonly eps: number;
  readonly silu: boolean;
  readonly x: Operand;
  /** Second source, channels from `splitChannels` (a multiple of 4) on. */
  readonly x2?: Operand | undefined;
  readonly splitChannels?: number | undefined;
  readonly gamma: Operand;
  readonly beta: Operand;
  /** Of `momentsBytes` bytes. */
  readonly moments: Operand;
  readonly out: Operand;
}

export function groupNormOf(
  args: GroupNormArgs,
  capabilities: Capabilities,
  forced?: string,
): readonly Dispatch[] {
  const { images, tokens, channels, x, x2, moments, gamma, beta, out, label } = args;
  if (channels % 8 !== 0) throw new Error(`${label}: channels ${channels} must be a multiple of 8`);
  const { variant, chunks, chunkTokens } = chunksOf(tokens, capabilities, forced);
  const quads = channels / 4;
  const split = x2 ? (args.splitChannels ?? 0) / 4 : quads;
  const sources = { x, ...(x2 ? { x2 } : {}) };
  const params = { tokens, quads, split, chunks, chunkTokens };
  const gridOf = (kernel: Kernel, channelsEach: number): Dispatch['grid'] => {
    const columns = constantOf(kernel, variant, 'LANES') * constantOf(kernel, variant, 'COLUMNS');
    return [ceilDiv(channels, columns * channelsEach), chunks, images];
  };
  const common = { variant, choices: {}, label };
  return [
    {
      ...common,
      kernel: groupMoments,
      grid: gridOf(groupMoments, 4),
      constants: {},
      operands: { ...sources, moments },
      params,
      flops: 5 * images * tokens * channels,
    },
    {
      ...common,
      kernel: groupApply,
      grid: gridOf(groupApply, 8),
      constants: args.silu ? { SILU: true } : {},
      operands: { ...sources, moments, gamma, beta, out },
      params: { ...params, groupChannels: channels / (args.groups ?? GROUPS), image0: 0, eps: args.eps },
      imageAxis: 2,
      flops: 2 * images * tokens * channels,
    },
  ];
}

export interface LayerNormArgs {
  readonly label: string;
  readonly images: number;
  /** Rows of one image. */
  readonly rows: number;
  /** A multiple of 4. */
  readonly channels: number;
  readonly eps: number;
  /** Of out; f32 unless told. */
  readonly storage?: Storage;
  readonly x: Operand;
  readonly gamma: Operand;
  readonly beta: Operand;
  readonly out: Operand;
}

export function layerNormOf(args: LayerNormArgs, capabilities: Capabilities, variant?: string): Dispatch {
  const { storage: format = 'f32', images, rows, channels, x, gamma, beta, out } = args;
  const { choice, decision } = pick(
    layerNorm,
    capabilities,
    { format, images, rows, columns: channels },
    variant,
  );
  return {
    kernel: layerNorm,
    variant: choice.variant,
    decision,
    choices: {},
    constants: {},
    operands: { x, gamma, beta, out },
    params: { rows, quads: channels / 4, image0: 0, eps: args.eps },
    grid: [ceilDiv(rows, constantOf(layerNorm, choice.variant, 'ROWS')), images, 1],
    imageAxis: 1,
    label: args.label,
    flops: 8 * images * rows * channels,
  };
}
