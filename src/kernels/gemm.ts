/**
 * Linear layers and convolutions as one GEMM, and the down projection of their low-rank terms. Formulas, layouts and
 * preconditions stand in `shaders/gemm/`. Builds dispatches; owns nothing.
 */
import {
  type Capabilities,
  ceilDiv,
  type Dispatch,
  defineKernel,
  type Kernel,
  type Operand,
} from '../gpu/kernel.ts';
import { lanesOf, MATRIX_VARIANTS, matrixVariants } from './matrix.ts';
import { choiceOf, PANEL, W_FILES, type WeightFormat } from './panel.ts';
import { pick, type Shape } from './pick.ts';

/** Ranks of one low-rank block. */
export const RANK_BLOCK = 8;

const A_FILES = { linear: 'gemm/a_linear.wgsl', concat: 'gemm/a_concat.wgsl', conv3: 'gemm/a_conv3.wgsl' };

/** What every variant ends with. */
const EPILOGUE = ['lib/phi.wgsl', 'gemm/store.wgsl'] as const;

const PARAMS = {
  m: 'u32',
  kQuads: 'u32',
  nQuads: 'u32',
  panels: 'u32',
  segmentQuads: 'u32',
  segmentStride: 'u32',
  addQuads: 'u32',
  addStride: 'u32',
  panel0: 'u32',
  split: 'u32',
  slotRow: 'u32',
  image0: 'u32',
  srcWidth: 'u32',
  srcHeight: 'u32',
  inWidth: 'u32',
  inHeight: 'u32',
  outWidth: 'u32',
  stride: 'u32',
} as const;

export const gemm: Kernel = defineKernel({
  name: 'gemm',
  bindings: {
    x: { type: 'array<Quad>', access: 'read_write' },
    x2: { type: 'array<Quad>', access: 'read_write', optional: true },
    w: { type: 'array<Weights>', access: 'read' },
    bias: { type: 'array<vec4f>', access: 'read', optional: true },
    add: { type: 'array<Quad>', access: 'read_write', optional: true },
    out: { type: 'array<Quad>', access: 'read_write' },
    t: { type: 'array<vec4f>', access: 'read_write', optional: true },
    up: { type: 'array<Quad>', access: 'read', optional: true },
    table: { type: 'array<vec4u>', access: 'read', optional: true },
  },
  params: PARAMS,
  options: {
    a: A_FILES,
    lora: { none: 'gemm/lora_none.wgsl', blocks: 'gemm/lora_blocks.wgsl' },
    w: W_FILES,
  },
  constants: { SILU: false, ADD_PER_ROW: true, GATED: false, LANES: 32 },
  variants: {
    broadcast32: { files: [...EPILOGUE, 'gemm/spread.wgsl', 'gemm/broadcast32.wgsl'], subgroupSize: 8 },
    broadcast8: {
      files: [...EPILOGUE, 'gemm/broadcast8.wgsl'],
      constants: { WORKGROUP: 64 },
      subgroupSize: 8,
    },
    tile: { files: [...EPILOGUE, 'gemm/two_panels.wgsl', 'gemm/tile.wgsl'] },
    ...matrixVariants([...EPILOGUE, 'gemm/two_panels.wgsl', 'gemm/sgm.wgsl']),
  },
});

/** What a workgroup computes: panels of out (or one panel and its gates), rows. */
const TILES: Readonly<Record<string, { readonly panels: number; readonly rows: number }>> = {
  broadcast32: { panels: 1, rows: 32 },
  broadcast8: { panels: 1, rows: 64 },
  tile: { panels: 2, rows: 64 },
  ...Object.fromEntries(MATRIX_VARIANTS.map((variant) => [variant, { panels: 2, rows: 64 }])),
};

export const loraDown: Kernel = defineKernel({
  name: 'lora_down',
  bindings: {
    x: { type: 'array<Quad>', access: 'read_write' },
    x2: { type: 'array<Quad>', access: 'read_write', optional: true },
    down: { type: 'array<Quad>', access: 'read' },
    table: { type: 'array<vec4u>', access: 'read' },
    t: { type: 'array<vec4f>', access: 'read_write' },
  },
  params: PARAMS,
  options: { a: A_FILES },
  constants: { ROWS: 1 },
  variants: {
    broadcast: {
      files: ['gemm/spread.wgsl', 'gemm/lora_down_broadcast.wgsl'],
      subgroupSize: 8,
    },
    rows: { files: ['gemm/lora_down_rows.wgsl', 'gemm/lora_down.wgsl'], constants: { ROWS: 4 } },
    row: { files: ['gemm/lora_down_rows.wgsl', 'gemm/lora_down.wgsl'] },
  },
});

/** How the rows of A are found. Sizes in pixels; the convolution sees inHeight x inWidth, scaled up from the source. */
export type Rows =
  | { readonly kind: 'linear' }
  | { readonly kind: 'concat'; readonly x2: Operand; readonly splitChannels: number }
  | {
      readonly kind: 'conv3';
      readonly srcHeight: number;
      readonly srcWidth: number;
      readonly inHeight: number;
      readonly inWidth: number;
      readonly outWidth: number;
      readonly stride: 1 | 2;
    };

/**
 * How columns lie in a tensor of several layers: segment after segment of so many columns, each [image, m, columns] and
 * `strideQuads` behind the one before.
 */
export interface Segments {
  readonly columns: number;
  readonly strideQuads: number;
}

export interface GemmArgs {
  readonly label: string;
  readonly images: number;
  /** Rows of one image (tokens or output pixels). */
  readonly m: number;
  /** Input channels of one tap, a multiple of 8. */
  readonly channels: number;
  /** Stored output columns, a multiple of 4. */
  readonly n: number;
  readonly rows: Rows;
  readonly x: Operand;
  readonly out: Operand;
  /** Of `out`; one segment of all columns unless told. */
  readonly segments?: Segments | undefined;
  /** Packed weights, [n / 32][taps * channels][32]; all of them, or the panels from `panel0` on. */
  readonly w: Operand;
  /** How `w` is stored: Quads unless told. */
  readonly format?: WeightFormat | undefined;
  readonly panel0?: number;
  readonly panels?: number;
  readonly bias?: Operand | undefined;
  /** Added to the result: [image, m, n], or [image, n] with `addPerImage`, in `addSegments`. */
  readonly add?: Operand | undefined;
  readonly addSegments?: Segments | undefined;
  readonly addPerImage?: boolean | undefined;
  readonly silu?: boolean | undefined;
  /** GEGLU: the layer has 2 * n columns, a multiple of 32 each of values and of gates, all of them in `w`. */
  readonly gated?: boolean | undefined;
}

/** Where the low-rank terms of a layer live; see `shaders/gemm/lora_blocks.wgsl`. */
export interface LoraOperands {
  readonly slot: number;
  readonly pool: Operand;
  readonly table: Operand;
  readonly t: Operand;
}

const tapsOf = (rows: Rows): number => (rows.kind === 'conv3' ? 9 : 1);

function paramsOf(args: GemmArgs, slot: number): Record<string, number> {
  const { rows } = args;
  const conv = rows.kind === 'conv3' ? rows : undefined;
  return {
    m: args.m,
    kQuads: args.channels / 4,
    nQuads: args.n / 4,
    panels: args.panels ?? ceilDiv(args.n, PANEL),
    panel0: args.panel0 ?? 0,
    ...segmentParams(args),
    split: rows.kind === 'concat' ? rows.splitChannels / 4 : 0,
    slotRow: slot * args.images,
    image0: 0,
    srcWidth: conv?.srcWidth ?? 0,
    srcHeight: conv?.srcHeight ?? 0,
    inWidth: conv?.inWidth ?? 0,
    inHeight: conv?.inHeight ?? 0,
    outWidth: conv?.outWidth ?? 0,
    stride: conv?.stride ?? 0,
  };
}

function segmentParams({ n, segments, addSegments }: GemmArgs): Record<string, number> {
  const whole = { columns: n, strideQuads: 0 };
  const out = segments ?? whole;
  const add = addSegments ?? whole;
  return {
    segmentQuads: out.columns / 4,
    segmentStride: out.strideQuads,
    addQuads: add.columns / 4,
    addStride: add.strideQuads,
  };
}

/** What the choice of a variant depends on, of the layer and of its down projection alike. */
const shapeOf = ({ format = 'f32', images, rows, m, channels }: GemmArgs): Shape => ({
  format,
  a: rows.kind,
  images,
  rows: m,
  depth: tapsOf(rows) * channels,
});

const sources = ({ x, rows }: GemmArgs): Record<string, Operand> =>
  rows.kind === 'concat' ? { x, x2: rows.x2 } : { x };

/** The layer itself; with `lora`, also the up projection of its low-rank terms, whose T `loraDownOf` makes first. */
export function gemmOf(
  args: GemmArgs,
  capabilities: Capabilities,
  lora?: LoraOperands,
  variant?: string,
): Dispatch {
  if (args.channels % 8 !== 0 || args.n % 4 !== 0)
    throw new Error(
      `${args.label}: channels ${args.channels} must be a multiple of 8, columns ${args.n} of 4`,
    );
  const params = paramsOf(args, lora?.slot ?? 0);
  const panels = params.panels!;
  const columns = (args.gated ? 2 : 1) * Math.min(panels * PANEL, args.n);
  const { choice, decision } = pick(gemm, capabilities, { ...shapeOf(args), columns }, variant);
  const tile = TILES[choice.variant]!;
  return {
    kernel: gemm,
    variant: choice.variant,
    decision,
    choices: { a: args.rows.kind, lora: lora ? 'blocks' : 'none', w: choiceOf(args.format) },
    constants: {
      ...lanesOf(gemm.variants[choice.variant], capabilities),
      ...(args.silu ? { SILU: true } : {}),
      ...(args.addPerImage ? { ADD_PER_ROW: false } : {}),
      ...(args.gated ? { GATED: true } : {}),
    },
    operands: {
      ...sources(args),
      w: args.w,
      out: args.out,
      ...(args.bias ? { bias: args.bias } : {}),
      ...(args.add ? { add: args.add } : {}),
      ...(lora ? { t: lora.t, up: lora.pool, table: lora.table } : {}),
    },
    params,
    grid: [ceilDiv(panels, args.gated ? 1 : tile.panels), ceilDiv(args.m, tile.rows), args.images],
    imageAxis: 2,
    label: args.label,
    flops: 2 * args.images * args.m * columns * tapsOf(args.rows) * args.channels,
  };
}

/**
 * T of the low-rank terms of all layers that read what this one reads first. grid.x is the number of blocks of the longest
 * list, known at each run.
 */
export function loraDownOf(
  args: GemmArgs,
  capabilities: Capabilities,
  lora: LoraOperands,
  variant?: string,
): Dispatch {
  const { choice, decision } = pick(loraDown, capabilities, shapeOf(args), variant);
  return {
    kernel: loraDown,
    variant: choice.variant,
    decision,
    choices: { a: args.rows.kind },
    constants: {},
    operands: { ...sources(args), down: lora.pool, table: lora.table, t: lora.t },
    params: paramsOf(args, lora.slot),
    grid: [1, ceilDiv(args.m, choice.variant === 'broadcast' ? 32 : 64), args.images],
    label: `${args.label} lora down`,
    flops: 2 * args.images * args.m * RANK_BLOCK * tapsOf(args.rows) * args.channels,
  };
}
