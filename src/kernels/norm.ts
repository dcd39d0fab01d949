/** Group norm (three steps: moments, fold, apply) and layer norm. Formulas stand in `shaders/norm/`. */
import {
  type Capabilities,
  ceilDiv,
  type Dispatch,
  defineKernel,
  type Kernel,
  type Operand,
} from '../gpu/kernel.ts';
import { pick } from './pick.ts';

const source = {
  x: { type: 'array<Quad>', access: 'read_write' },
  x2: { type: 'array<Quad>', access: 'read_write', optional: true },
} as const;

export const groupMoments: Kernel = defineKernel({
  name: 'group_norm_moments',
  bindings: { ...source, moments: { type: 'array<vec4f>', access: 'read_write' } },
  params: { tokens: 'u32', quads: 'u32', split: 'u32', chunks: 'u32', chunkTokens: 'u32' },
  variants: { plain: { files: ['norm/moments.wgsl'] } },
});

export const groupFold: Kernel = defineKernel({
  name: 'group_norm_fold',
  bindings: {
    moments: { type: 'array<f32>', access: 'read_write' },
    gamma: { type: 'array<f32>', access: 'read' },
    beta: { type: 'array<f32>', access: 'read' },
    affine: { type: 'array<f32>', access: 'read_write' },
  },
  params: {
    tokens: 'u32',
    channels: 'u32',
    groups: 'u32',
    groupChannels: 'u32',
    chunks: 'u32',
    chunkTokens: 'u32',
    image0: 'u32',
    eps: 'f32',
  },
  variants: { plain: { files: ['norm/fold.wgsl'] } },
});

export const groupApply: Kernel = defineKernel({
  name: 'group_norm_apply',
  bindings: {
    ...source,
    affine: { type: 'array<vec4f>', access: 'read_write' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: { tokens: 'u32', quads: 'u32', split: 'u32', rows: 'u32' },
  constants: { SILU: false },
  variants: { plain: { files: ['norm/apply.wgsl'] } },
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
    lanes: { files: ['norm/layer_norm_lanes.wgsl'], subgroupSize: 8 },
    shared: { files: ['norm/layer_norm.wgsl'] },
  },
});

/** Groups of every group norm of these UNets. */
export const GROUPS = 32;
/** Tokens whose moments one invocation sums. */
const CHUNK_TOKENS = 64;
/** From so many quads on there are invocations enough for each to own 16 of them in `apply`; else 4. */
const MANY_QUADS = 2 ** 16;

/** Rows of a layer norm that one workgroup of either variant owns. */
const ROWS_OF_GROUP = 4;

/** Bytes of the intermediate tensors of a group norm. */
export function groupNormScratch(
  images: number,
  tokens: number,
  channels: number,
): { momentsBytes: number; affineBytes: number } {
  const chunks = ceilDiv(tokens, CHUNK_TOKENS);
  return { momentsBytes: images * chunks * 2 * channels * 4, affineBytes: images * 2 * channels * 4 };
}

export interface GroupNormArgs {
  readonly label: string;
  readonly images: number;
  readonly tokens: number;
  /** A multiple of 32; with `x2`, of both tensors together. */
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
  readonly moments: Operand;
  readonly affine: Operand;
  readonly out: Operand;
}

export function groupNormOf(args: GroupNormArgs): readonly Dispatch[] {
  const { images, tokens, channels, moments, affine, label } = args;
  const groups = args.groups ?? GROUPS;
  const chunks = ceilDiv(tokens, CHUNK_TOKENS);
  const quads = channels / 4;
  const split = args.x2 ? (args.splitChannels ?? 0) / 4 : quads;
  const rows = images * tokens * quads < MANY_QUADS ? 4 : 16;
  const x = { x: args.x, ...(args.x2 ? { x2: args.x2 } : {}) };
  const common = { variant: 'plain', choices: {}, label };
  return [
    {
      ...common,
      kernel: groupMoments,
      constants: {},
      operands: { ...x, moments },
      params: { tokens, quads, split, chunks, chunkTokens: CHUNK_TOKENS },
      grid: [ceilDiv(quads, 16), chunks, images],
      flops: 5 * images * tokens * channels,
    },
    {
      ...common,
      kernel: groupFold,
      constants: {},
      operands: { moments, gamma: args.gamma, beta: args.beta, affine },
      params: {
        tokens,
        channels,
        groups,
        groupChannels: channels / groups,
        chunks,
        chunkTokens: CHUNK_TOKENS,
        image0: 0,
        eps: args.eps,
      },
      grid: [ceilDiv(groups, 32), images, 1],
      imageAxis: 1,
      flops: 6 * images * chunks * channels,
    },
    {
      ...common,
      kernel: groupApply,
      constants: args.silu ? { SILU: true } : {},
      operands: { ...x, affine, out: args.out },
      params: { tokens, quads, split, rows },
      grid: [ceilDiv(quads, 16), ceilDiv(tokens, 4 * rows), images],
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
  readonly x: Operand;
  readonly gamma: Operand;
  readonly beta: Operand;
  readonly out: Operand;
}

export function layerNormOf(args: LayerNormArgs, capabilities: Capabilities, variant?: string): Dispatch {
  const chosen = variant ?? pick(layerNorm, capabilities);
  const { x, gamma, beta, out } = args;
  return {
    kernel: layerNorm,
    variant: chosen,
    choices: {},
    constants: {},
    operands: { x, gamma, beta, out },
    params: { rows: args.rows, quads: args.channels / 4, image0: 0, eps: args.eps },
    grid: [ceilDiv(args.rows, ROWS_OF_GROUP), args.images, 1],
    imageAxis: 1,
    label: args.label,
    flops: 8 * args.images * args.rows * args.channels,
  };
}
