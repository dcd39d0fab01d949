/**
 * Linear layers and convolutions as one GEMM, and the down projection of their low-rank terms. Formulas, layouts and
 * preconditions stand in `shaders/gemm/`. Builds dispatches; owns nothing.
 */
import {
  type Capabilities,
  type Choice,
  ceilDiv,
  type Decision,
  type Dispatch,
  defineKernel,
  type Kernel,
  type Operand,
} from '../gpu/kernel.ts';
import {
  EPILOGUE,
  type EpilogueArgs,
  epilogueConstants,
  epilogueOperands,
  epilogueParams,
} from './epilogue.ts';
import { lanesOf, MATRIX_VARIANTS, matrixVariants } from './matrix.ts';
import { choiceOf, PANEL, W_FILES, type WeightFormat } from './panel.ts';
import { pick, type Shape, type Ways } from './pick.ts';

/** Ranks of one low-rank block. */
export const RANK_BLOCK = 8;

const A_FILES = { linear: 'gemm/a_linear.wgsl', concat: 'gemm/a_concat.wgsl', conv3: 'gemm/a_conv3.wgsl' };

const PARAMS = {
  ...EPILOGUE.params,
  kQuads: 'u32',
  kSplits: 'u32',
  panels: 'u32',
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
    ...EPILOGUE.bindings,
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
  constants: { ...EPILOGUE.constants, LANES: 32 },
  variants: {
    broadcast32: {
      files: [...EPILOGUE.files, 'gemm/rows32.wgsl', 'gemm/spread.wgsl', 'gemm/broadcast32.wgsl'],
      subgroupSize: 8,
    },
    broadcast8: {
      files: [...EPILOGUE.files, 'gemm/broadcast8.wgsl'],
      constants: { WORKGROUP: 64 },
      subgroupSize: 8,
    },
    winograd: {
      files: [...EPILOGUE.files, 'gemm/winograd.wgsl'],
      choices: { a: ['conv3'] },
      units: { x: 'pair' },
      subgroupSize: 8,
    },
    tile: { files: [...EPILOGUE.files, 'gemm/place.wgsl', 'gemm/tile.wgsl'] },
    ...matrixVariants([...EPILOGUE.files, 'gemm/place.wgsl', 'gemm/sgm.wgsl']),
  },
});

interface Tile {
  readonly panels: number;
  readonly rows: number;
  readonly cutsK: boolean;
}

/**
 * What a workgroup computes: panels of out (or one panel and its gates), and rows, or runs of pixels; and whether it can do so for a
 * part of K.
 */
export const TILES: Readonly<Record<string, Tile>> = {
  broadcast32: { panels: 1, rows: 32, cutsK: false },
  broadcast8: { panels: 1, rows: 64, cutsK: false },
  winograd: { panels: 1, rows: 8, cutsK: false },
  tile: { panels: 2, rows: 64, cutsK: true },
  ...Object.fromEntries(MATRIX_VARIANTS.map((variant) => [variant, { panels: 2, rows: 64, cutsK: true }])),
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
      files: ['gemm/rows32.wgsl', 'gemm/spread.wgsl', 'gemm/lora_down_broadcast.wgsl'],
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

/** How a GEMM is computed. Results of one choice differ from those of another by rounding only. */
export interface GemmChoice extends Choice {
  /** Parts that K is cut into; more than one where the variant can (`TILES`). */
  readonly splits: number;
  /** What it was chosen from. */
  readonly decision?: Decision | undefined;
}

/** Sizes of a layer that its choice depends on. */
export type GemmSizes = Pick<GemmArgs, 'images' | 'm' | 'n' | 'gated' | 'channels' | 'rows' | 'format'>;

export interface GemmArgs extends EpilogueArgs {
  /** Input channels of one tap, a multiple of 8. */
  readonly channels: number;
  readonly rows: Rows;
  readonly x: Operand;
  /** Packed weights, [n / 32][taps * channels][32]; all of them, or the panels from `panel0` on. With `gated`, all. */
  readonly w: Operand;
  /** How `w` is stored: Quads unless told. */
  readonly format?: WeightFormat | undefined;
  readonly panel0?: number;
  readonly panels?: number;
  /** The variant of the rules, K in one piece, unless told. */
  readonly choice?: GemmChoice | undefined;
  /** Where K is cut: room for the sums of its parts, `partialsOf` values of f32. */
  readonly partials?: Operand | undefined;
}

/** Where the low-rank terms of a layer live; see `shaders/gemm/lora_blocks.wgsl`. */
export interface LoraOperands {
  readonly slot: number;
  readonly pool: Operand;
  readonly table: Operand;
  readonly t: Operand;
}

export const tapsOf = (rows: Rows): number => (rows.kind === 'conv3' ? 9 : 1);

/** Columns of a layer: gates are columns of their own until they are stored. */
export const columnsOf = ({ n, gated }: Pick<GemmArgs, 'n' | 'gated'>): number => (gated ? 2 * n : n);

/** Panels of out that a dispatch computes. */
export const panelsOf = ({ n, panels }: GemmArgs): number => panels ?? ceilDiv(n, PANEL);

/** Runs of up to four output pixels side by side, which `winograd` computes; 0 where it cannot. */
const runsOf = ({ m, rows }: GemmSizes): number =>
  rows.kind === 'conv3' && rows.stride === 1 ? (m / rows.outWidth) * ceilDiv(rows.outWidth, 4) : 0;

function paramsOf(args: GemmArgs, slot: number): Record<string, number> {
  const { rows } = args;
  const conv = rows.kind === 'conv3' ? rows : undefined;
  return {
    ...epilogueParams(args),
    kQuads: args.channels / 4,
    kSplits: args.choice?.splits ?? 1,
    panels: panelsOf(args),
    panel0: args.panel0 ?? 0,
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

/** What the choice of a variant depends on, of the layer and of its down projection alike. */
const shapeOf = (args: GemmSizes): Shape => ({
  format: args.format ?? 'f32',
  a: args.rows.kind,
  images: args.images,
  rows: args.m,
  runs: runsOf(args),
  depth: tapsOf(args.rows) * args.channels,
});

const sources = ({ x, rows }: GemmArgs): Record<string, Operand> =>
  rows.kind === 'concat' ? { x, x2: rows.x2 } : { x };

/** How a layer is computed, K in one piece unless there are other `ways`. */
export function pickGemm(sizes: GemmSizes, capabilities: Capabilities, ways?: Ways): GemmChoice {
  const shape = { ...shapeOf(sizes), columns: columnsOf(sizes) };
  const { choice, decision } = pick(gemm, capabilities, shape, undefined, ways);
  return { splits: 1, ...choice, decision };
}

/**
 * The layer itself; with `lora`, also the up projection of its low-rank terms, whose T `loraDownOf` makes first. Where K is cut,
 * `out` gets the sums of each part, those of an image one behind the other: see `split_k.ts`.
 */
export function gemmOf(args: GemmArgs, capabilities: Capabilities, lora?: LoraOperands): Dispatch {
  if (args.channels % 8 !== 0 || args.n % 4 !== 0)
    throw new Error(
      `${args.label}: channels ${args.channels} must be a multiple of 8, columns ${args.n} of 4`,
    );
  const { variant, splits, decision } = args.choice ?? pickGemm(args, capabilities);
  const tile = TILES[variant]!;
  if (splits > 1 && !tile.cutsK) throw new Error(`${args.label}: ${variant} does not cut K`);
  const panels = panelsOf(args);
  const columns = columnsOf({ ...args, n: Math.min(panels * PANEL, args.n) });
  const rows = variant === 'winograd' ? runsOf(args) : args.m;
  return {
    kernel: gemm,
    variant,
    decision,
    choices: { a: args.rows.kind, lora: lora ? 'blocks' : 'none', w: choiceOf(args.format) },
    constants: {
      ...lanesOf(gemm.variants[variant], capabilities),
      ...epilogueConstants(args),
    },
    operands: {
      ...sources(args),
      ...epilogueOperands(args),
      w: args.w,
      ...(lora ? { t: lora.t, up: lora.pool, table: lora.table } : {}),
    },
    params: paramsOf(args, lora?.slot ?? 0),
    grid: [ceilDiv(panels, args.gated ? 1 : tile.panels), ceilDiv(rows, tile.rows) * splits, args.images],
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
