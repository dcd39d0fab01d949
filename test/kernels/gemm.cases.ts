/**
 * Cases of `gemm`: linear, concatenated and convolved rows, every epilogue, split panels, K in parts, and low-rank terms whose T
 * `lora_down` makes in the case itself. Tolerances follow the accumulation length (see case.ts).
 */
import type { Dispatch, Operand, Storage } from '../../src/gpu/kernel.ts';
import type { Segments } from '../../src/kernels/epilogue.ts';
import { type GemmArgs, gemm, loraDownOf, pickGemm, type Rows, TILES } from '../../src/kernels/gemm.ts';
import { PANEL } from '../../src/kernels/panel.ts';
import { gemmsOf, partialsOf } from '../../src/kernels/split_k.ts';
import {
  type Built,
  type Case,
  formatOf,
  type Input,
  type Output,
  random,
  storagesOf,
  stored,
  tolerance,
} from './case.ts';
import { beside, gelu, outSide, panelsOf, product, silu, unfold } from './gemm_reference.ts';
import { GEMM_SHAPES, type GemmShape } from './gemm_shapes.ts';
import { type LoraData, loraData } from './lora_tables.ts';
import { quantised } from './q8_0_reference.ts';
import { SPLIT_K_SHAPES } from './split_k_shapes.ts';

const SLOT = 2;

interface Data {
  readonly images: number;
  readonly m: number;
  readonly k: number;
  /** Columns of the layer. */
  readonly columns: number;
  readonly x: Float32Array;
  readonly x2: Float32Array | undefined;
  /** [n][k] as the kernel reads them, and in 8-bit blocks. */
  readonly w: Float32Array;
  readonly blocks: Uint32Array | undefined;
  readonly bias: Float32Array | undefined;
  readonly add: Float32Array | undefined;
  readonly lora: LoraData | undefined;
}

export function gemmData(shape: GemmShape, storage: Storage): Data {
  const { name, channels, n, conv, split } = shape;
  const columns = shape.gated ? 2 * n : n;
  const images = shape.images ?? 1;
  const m = conv ? outSide(conv.inHeight, conv.stride) * outSide(conv.inWidth, conv.stride) : (shape.m ?? 1);
  const rows = conv ? conv.srcHeight * conv.srcWidth : m;
  const k = (conv ? 9 : 1) * channels;
  const tensor = (what: string, count: number, size = 1): Float32Array =>
    stored(random(`${name} ${what}`, count, -size, size), storage, formatOf(shape, what));
  const w = tensor('w', columns * k, 2 / Math.sqrt(k));
  const blocks = shape.blocks ? quantised(w, columns, k) : undefined;
  return {
    images,
    m,
    k,
    columns,
    x: tensor('x', images * rows * (split ?? channels)),
    x2: split ? tensor('x2', images * rows * (channels - split)) : undefined,
    w: blocks?.values ?? w,
    blocks: blocks?.words,
    bias: shape.bias ? random(`${name} bias`, columns) : undefined,
    add: shape.add ? tensor('add', images * (shape.add === 'row' ? m : 1) * n) : undefined,
    lora: shape.lora
      ? loraData(name, [...(shape.beside ?? []), shape.lora], { k, n: columns, slot: SLOT }, storage)
      : undefined,
  };
}

/** A [image, m, k] in f64. */
export function rowsOfA(shape: GemmShape, data: Data): Float64Array {
  if (shape.conv) return unfold(data.x, data.images, shape.channels, shape.conv);
  if (data.x2) return beside(data.x, data.x2, data.images * data.m, shape.channels, shape.split ?? 0);
  return Float64Array.from(data.x);
}

function reference(shape: GemmShape, data: Data): Float64Array {
  const { images, m, k, columns, lora, bias, add } = data;
  const { n } = shape;
  const a = rowsOfA(shape, data);
  const layer = product(a, data.w, images * m, columns, k);
  for (let image = 0; image < images; image++) {
    const rows = a.subarray(image * m * k, (image + 1) * m * k);
    for (const { rank, scale, down, up } of lora?.layers.at(-1)?.[image] ?? []) {
      const t = product(rows, down, m, rank, k);
      const delta = product(t, up, m, columns, rank);
      for (let i = 0; i < m * columns; i++) layer[image * m * columns + i]! += scale * delta[i]!;
    }
  }
  const biased = (row: number, column: number): number =>
    layer[row * columns + column]! + (bias?.[column] ?? 0);
  return Float64Array.from({ length: images * m * n }, (_, i) => {
    const row = Math.floor(i / n);
    const column = i % n;
    let v = biased(row, column);
    if (shape.gated) v *= gelu(biased(row, n + column));
    if (add) v += add[shape.add === 'row' ? i : Math.floor(row / m) * n + column]!;
    return shape.silu ? silu(v) : v;
  });
}

/** Where the segments of a tensor of so many rows lie, with as many quads between them. */
const segmentsOf = ({ segment }: GemmShape, rows: number, gapQuads = 0): Segments | undefined =>
  segment ? { columns: segment, strideQuads: (rows * segment) / 4 + gapQuads } : undefined;

/** Quads between segments of `add`. */
const GAP = 16;

/** Rows of `n` columns as they lie in segments; what is between these is 0. */
function inSegments<T extends Float32Array | Float64Array>(
  values: T,
  rows: number,
  n: number,
  segments: Segments | undefined,
): T {
  if (!segments) return values;
  const { columns, strideQuads } = segments;
  const out = new (values.constructor as new (length: number) => T)((n / columns) * strideQuads * 4);
  for (let row = 0; row < rows; row++)
    for (let c = 0; c < n; c++)
      out[Math.floor(c / columns) * strideQuads * 4 + row * columns + (c % columns)] = values[row * n + c]!;
  return out;
}

function rowsOf(shape: GemmShape, x2: Operand | undefined): Rows {
  const { conv } = shape;
  if (conv) return { kind: 'conv3', ...conv, outWidth: outSide(conv.inWidth, conv.stride) };
  return x2 ? { kind: 'concat', x2, splitChannels: shape.split ?? 0 } : { kind: 'linear' };
}

/** The arguments of both kernels of the family, from a case's operands. */
export function gemmArgs(
  shape: GemmShape,
  data: Pick<Data, 'images' | 'm'>,
  operands: Readonly<Record<string, Operand>>,
  storage: Storage,
): GemmArgs {
  return {
    label: shape.name,
    images: data.images,
    m: data.m,
    channels: shape.channels,
    n: shape.n,
    rows: rowsOf(shape, operands.x2),
    x: operands.x!,
    out: operands.out!,
    w: operands.w!,
    format: shape.blocks ? 'q8_0' : storage,
    bias: operands.bias,
    add: operands.add,
    addPerImage: shape.add === 'image',
    silu: shape.silu,
    gated: shape.gated,
    segments: segmentsOf(shape, data.images * data.m),
    addSegments: segmentsOf(shape, data.images * (shape.add === 'row' ? data.m : 1), GAP),
  };
}

export function gemmInputs(shape: GemmShape, data: Data): Record<string, Input> {
  const inputs: Record<string, Input> = { x: { as: formatOf(shape, 'x'), values: data.x } };
  const panels = panelsOf(data.w, data.columns, data.k, PANEL);
  const cut = (shape.splitPanels ?? 0) * data.k * PANEL;
  inputs.w = data.blocks
    ? { as: 'words', values: data.blocks, resident: true }
    : { as: 'quad', values: cut ? panels.subarray(0, cut) : panels, resident: true };
  if (cut) inputs.w1 = { as: 'quad', values: panels.subarray(cut), resident: true };
  if (data.x2) inputs.x2 = { as: formatOf(shape, 'x2'), values: data.x2 };
  if (data.bias) inputs.bias = { as: 'f32', values: data.bias, resident: true };
  if (data.add) {
    const rows = data.images * (shape.add === 'row' ? data.m : 1);
    inputs.add = {
      as: formatOf(shape, 'add'),
      values: inSegments(data.add, rows, shape.n, segmentsOf(shape, rows, GAP)),
    };
  }
  if (data.lora) {
    inputs.pool = { as: 'quad', values: data.lora.pool, resident: true };
    inputs.table = { as: 'words', values: data.lora.table, resident: true };
  }
  return inputs;
}

/** A dispatch as one for each image. */
const apart = (dispatch: Dispatch): readonly Dispatch[] =>
  Array.from({ length: dispatch.grid[2] }, (_, image0) => ({
    ...dispatch,
    params: { ...dispatch.params, image0 },
    grid: [dispatch.grid[0], dispatch.grid[1], 1],
  }));

/** The weights that a variant multiplies: matrix units for halves take an 8-bit number times its scale as the nearest half. */
const multiplied = ({ w, blocks }: Data, variant: string | undefined): Float32Array =>
  blocks && gemm.variants[variant ?? '']?.matrix?.input === 'f16' ? stored(w, 'f16') : w;

function build(shape: GemmShape, storage: Storage, variant?: string): Built {
  const data = gemmData(shape, storage);
  const { images, m, k, lora } = data;
  const outputs: Record<string, Output> = {
    out: {
      as: formatOf(shape, 'out'),
      count: images * m * shape.n,
      expected: () => {
        const out = reference(shape, { ...data, w: multiplied(data, variant) });
        return inSegments(out, images * m, shape.n, segmentsOf(shape, images * m));
      },
      tolerance: tolerance(formatOf(shape, 'out'), storage, k + 64),
    },
  };
  if (lora) outputs.t = { as: 'f32', count: lora.totalBlocks * m * 8 };
  const { splits = 1 } = shape;
  if (splits > 1) {
    const count = partialsOf({ ...shape, images, m }, { splits });
    outputs.partials = { as: storage === 'f32' ? 'f32' : 'wide', count };
  }
  const elements = data.x.length + (data.x2?.length ?? 0) + data.w.length + images * m * shape.n;
  return {
    inputs: gemmInputs(shape, data),
    outputs,
    bytes: elements * (storage === 'f16' ? 2 : 4),
    dispatches: (operands, capabilities, variant) => {
      const whole = gemmArgs(shape, data, operands, storage);
      const choice = { ...pickGemm(whole, capabilities), ...(variant ? { variant } : {}), splits };
      const args = { ...whole, choice, partials: operands.partials };
      if (lora) {
        const { pool, table, t } = operands;
        const where = { slot: SLOT, pool: pool!, table: table!, t: t! };
        const down = loraDownOf(args, capabilities, where);
        const own = { ...where, slot: SLOT + lora.layers.length - 1 };
        return [
          { ...down, grid: [lora.longest, down.grid[1], down.grid[2]] },
          ...gemmsOf(args, capabilities, own).flatMap((one) => (shape.imageByImage ? apart(one) : [one])),
        ];
      }
      const first = shape.splitPanels;
      if (!first) return gemmsOf(args, capabilities);
      const rest = Math.ceil(shape.n / PANEL) - first;
      return [
        ...gemmsOf({ ...args, panels: first }, capabilities),
        ...gemmsOf({ ...args, w: operands.w1!, panel0: first, panels: rest }, capabilities),
      ];
    },
  };
}

/** Only some variants cut K; Winograd's form is for 3x3 convolutions of stride 1. */
const runs = (variant: string, { splits, conv }: GemmShape): boolean =>
  splits ? TILES[variant]!.cutsK : variant !== 'winograd' || conv?.stride === 1;

export const gemmCase = (shape: GemmShape): Case => ({
  name: shape.name,
  kernel: gemm,
  variants: Object.keys(gemm.variants).filter((variant) => runs(variant, shape)),
  ...(shape.blocks ? { storages: ['f16'] } : storagesOf(shape)),
  build: (storage, variant) => build(shape, storage, variant),
});

export const CASES: readonly Case[] = [...GEMM_SHAPES, ...SPLIT_K_SHAPES].map(gemmCase);
