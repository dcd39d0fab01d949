/**
 * Steps of patching a weight in f32: unpack it, combine it with what an adapter holds, pack it again (`pack.ts`). Formulas,
 * layouts and preconditions stand in `shaders/patch/`. Builds dispatches; owns nothing and knows no adapter kinds.
 */
import { ceilDiv, type Dispatch, defineKernel, type Kernel, type Operand } from '../gpu/kernel.ts';
import { PACK_DTYPES } from './pack.ts';
import { choiceOf, W_FILES, type WeightFormat } from './panel.ts';

export const unpack: Kernel = defineKernel({
  name: 'unpack',
  bindings: {
    w: { type: 'array<Weights>', access: 'read' },
    out: { type: 'array<f32>', access: 'read_write' },
  },
  params: { rows: 'u32', channels: 'u32', paddedChannels: 'u32', taps: 'u32' },
  options: { w: W_FILES },
  variants: { plain: { files: ['patch/unpack.wgsl'] } },
});

export const combine: Kernel = defineKernel({
  name: 'patch_combine',
  bindings: {
    base: { type: 'array<f32>', access: 'read', optional: true },
    x: { type: 'array<u32>', access: 'read', optional: true },
    blocks: { type: 'array<Quad>', access: 'read', optional: true },
    right: { type: 'array<f32>', access: 'read', optional: true },
    y: { type: 'array<f32>', access: 'read', optional: true },
    out: { type: 'array<f32>', access: 'read_write' },
  },
  params: {
    rows: 'u32',
    columns: 'u32',
    keep: 'f32',
    scale: 'f32',
    xAt: 'u32',
    rightAt: 'u32',
    rowDiv: 'u32',
    columnDiv: 'u32',
    stride: 'u32',
    terms: 'u32',
    yAt: 'u32',
    yRows: 'u32',
    yColumns: 'u32',
  },
  options: {
    x: { dense: 'patch/x_dense.wgsl', blocks: 'patch/x_blocks.wgsl', product: 'patch/x_product.wgsl' },
  },
  constants: { DTYPE: 0 },
  variants: { plain: { files: ['patch/combine.wgsl'] } },
});

export const product: Kernel = defineKernel({
  name: 'patch_product',
  bindings: {
    w: { type: 'array<f32>', access: 'read' },
    left: { type: 'array<f32>', access: 'read' },
    out: { type: 'array<f32>', access: 'read_write' },
  },
  params: { rows: 'u32', channels: 'u32', taps: 'u32', rank: 'u32', leftAt: 'u32' },
  variants: { plain: { files: ['patch/product.wgsl'] } },
});

export const rotate: Kernel = defineKernel({
  name: 'patch_rotate',
  bindings: {
    w: { type: 'array<f32>', access: 'read' },
    blocks: { type: 'array<f32>', access: 'read' },
    out: { type: 'array<f32>', access: 'read_write' },
  },
  params: { columns: 'u32', size: 'u32', halves: 'u32', mAt: 'u32', mix: 'f32' },
  variants: { plain: { files: ['patch/rotate.wgsl'] } },
});

export const norms: Kernel = defineKernel({
  name: 'patch_norms',
  bindings: {
    w: { type: 'array<f32>', access: 'read' },
    magnitude: { type: 'array<f32>', access: 'read' },
    out: { type: 'array<f32>', access: 'read_write' },
  },
  params: {
    count: 'u32',
    run: 'u32',
    step: 'u32',
    jump: 'u32',
    copies: 'u32',
    magnitudeAt: 'u32',
  },
  variants: { plain: { files: ['patch/norms.wgsl'] } },
});

/** A weight in a file's layout, [rows][channels][taps]; a vector is [rows][1][1]. */
export interface WeightShape {
  readonly rows: number;
  readonly channels: number;
  readonly taps: number;
}

/** f32 values (or those of `dtype`) in a buffer, from word `at` on. */
export interface Words {
  readonly operand: Operand;
  readonly at: number;
}

const plain = { variant: 'plain', choices: {}, constants: {} } as const;
const columnsOf = ({ channels, taps }: WeightShape): number => channels * taps;

/** A packed weight into `out` [rows][channels][taps]. */
export function unpackOf(args: {
  readonly label: string;
  readonly shape: WeightShape;
  readonly paddedChannels: number;
  readonly w: Operand;
  /** How `w` is stored: Quads unless told. */
  readonly format?: WeightFormat | undefined;
  readonly out: Operand;
}): Dispatch {
  const { label, shape, paddedChannels, w, format, out } = args;
  const { rows, channels, taps } = shape;
  return {
    ...plain,
    kernel: unpack,
    choices: { w: choiceOf(format) },
    operands: { w, out },
    params: { rows, channels, paddedChannels, taps },
    grid: [ceilDiv(columnsOf(shape), 64), ceilDiv(rows, 4), 1],
    label,
    flops: 0,
  };
}

/** The first factor of a combination; each is a row of `shaders/patch/x_*.wgsl`. */
export type Factor =
  /** A matrix with rows of `stride` values, spread over rowDiv x columnDiv of the weight each. */
  | (Words & {
      readonly kind: 'dense';
      readonly dtype?: string;
      readonly stride: number;
      readonly rowDiv?: number;
      readonly columnDiv?: number;
    })
  /** `count` low-rank blocks of the weight's own shape, from quad `at` on. */
  | {
      readonly kind: 'blocks';
      readonly operand: Operand;
      readonly at: number;
      readonly count: number;
      readonly paddedChannels: number;
    }
  /** What `productOf` made, times [rank][channels]; `taps` as given there. */
  | (Words & {
      readonly kind: 'product';
      readonly right: Words;
      readonly rank: number;
      readonly taps: number;
    });

export interface CombineArgs {
  readonly label: string;
  readonly shape: WeightShape;
  readonly keep: number;
  readonly scale: number;
  readonly x: Factor;
  /** [rows][columns], repeated over the weight. */
  readonly y?: Words & { readonly rows: number; readonly columns: number };
  /** What `keep` multiplies, where it is not `out` itself. */
  readonly base?: Operand | undefined;
  readonly out: Operand;
}

/** out = keep * base + scale * x * y, element by element over the weight. */
export function combineOf({ label, shape, keep, scale, x, y, base, out }: CombineArgs): Dispatch {
  const columns = columnsOf(shape);
  return {
    kernel: combine,
    variant: 'plain',
    choices: { x: x.kind },
    constants: x.kind === 'dense' && x.dtype ? { DTYPE: PACK_DTYPES[x.dtype] ?? 0 } : {},
    operands: {
      ...(base ? { base } : {}),
      ...(x.kind === 'blocks' ? { blocks: x.operand } : { x: x.operand }),
      ...(x.kind === 'product' ? { right: x.right.operand } : {}),
      ...(y ? { y: y.operand } : {}),
      out,
    },
    params: {
      rows: shape.rows,
      columns,
      keep,
      scale,
      xAt: x.at,
      rightAt: x.kind === 'product' ? x.right.at : 0,
      rowDiv: x.kind === 'dense' ? (x.rowDiv ?? 1) : 1,
      columnDiv: x.kind === 'dense' ? (x.columnDiv ?? 1) : x.kind === 'blocks' ? shape.taps : x.taps,
      stride: x.kind === 'dense' ? x.stride : x.kind === 'blocks' ? x.paddedChannels : 0,
      terms: x.kind === 'dense' ? 0 : x.kind === 'blocks' ? x.count : x.rank,
      yAt: y?.at ?? 0,
      yRows: y?.rows ?? 1,
      yColumns: y?.columns ?? 1,
    },
    grid: [ceilDiv(columns, 64), ceilDiv(shape.rows, 4), 1],
    label,
    flops: shape.rows * columns * (x.kind === 'dense' ? 4 : x.kind === 'blocks' ? 16 * x.count : 2 * x.rank),
  };
}

/** w times `left` [channels][rank] over its channels, [rows][rank][taps]. */
export function productOf(args: {
  readonly label: string;
  readonly shape: WeightShape;
  readonly rank: number;
  readonly w: Operand;
  readonly left: Words;
  readonly out: Operand;
}): Dispatch {
  const { label, shape, rank, w, left, out } = args;
  const { rows, channels, taps } = shape;
  return {
    ...plain,
    kernel: product,
    operands: { w, left: left.operand, out },
    params: { rows, channels, taps, rank, leftAt: left.at },
    grid: [ceilDiv(rank * taps, 64), ceilDiv(rows, 4), 1],
    label,
    flops: 2 * rows * columnsOf(shape) * rank,
  };
}

/** Rows of w mixed by blocks [rows / size][size][size]; `halves` and `mix` as the shader says. */
export function rotateOf(args: {
  readonly label: string;
  readonly shape: WeightShape;
  readonly size: number;
  readonly halves: number;
  readonly mix: number;
  readonly w: Operand;
  readonly blocks: Words;
  readonly out: Operand;
}): Dispatch {
  const { label, shape, size, halves, mix, w, blocks, out } = args;
  const columns = columnsOf(shape);
  return {
    ...plain,
    kernel: rotate,
    operands: { w, blocks: blocks.operand, out },
    params: { columns, size, halves, mAt: blocks.at, mix },
    grid: [ceilDiv(columns, 64), (shape.rows / size) * ceilDiv(size, 4), 1],
    label,
    flops: 2 * shape.rows * columns * size,
  };
}

/**
 * magnitude / (norm + eps) of each row, [rows], or of each input channel, [channels * taps] with every value `taps` times: as
 * `combineOf` takes a y.
 */
export function normsOf(args: {
  readonly label: string;
  readonly shape: WeightShape;
  readonly axis: 'output' | 'input';
  readonly w: Operand;
  readonly magnitude: Words;
  readonly out: Operand;
}): Dispatch {
  const { label, shape, axis, w, magnitude, out } = args;
  const { rows, channels, taps } = shape;
  const columns = columnsOf(shape);
  const along =
    axis === 'output'
      ? { count: columns, run: columns, step: columns, jump: 0, copies: 1 }
      : { count: rows * taps, run: taps, step: taps, jump: columns, copies: taps };
  return {
    ...plain,
    kernel: norms,
    operands: { w, magnitude: magnitude.operand, out },
    params: { ...along, magnitudeAt: magnitude.at },
    grid: [axis === 'output' ? rows : channels, 1, 1],
    label,
    flops: 2 * rows * columns,
  };
}
