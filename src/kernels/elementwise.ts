/** GEGLU, and the turns between what clients send (NCHW) and how activations lie (NHWC in quads). */
import { ceilDiv, type Dispatch, defineKernel, type Kernel, type Operand } from '../gpu/kernel.ts';

export const geglu: Kernel = defineKernel({
  name: 'geglu',
  bindings: {
    x: { type: 'array<Quad>', access: 'read_write' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: { rows: 'u32', quads: 'u32' },
  variants: { plain: { files: ['lib/phi.wgsl', 'elementwise/geglu.wgsl'] } },
});

export const copy: Kernel = defineKernel({
  name: 'copy',
  bindings: {
    x: { type: 'array<Quad>', access: 'read_write' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: { quads: 'u32', rowQuads: 'u32' },
  variants: { plain: { files: ['elementwise/copy.wgsl'] } },
});

export const fromNchw: Kernel = defineKernel({
  name: 'from_nchw',
  bindings: {
    src: { type: 'array<Quad>', access: 'read_write' },
    add: { type: 'array<Quad>', access: 'read_write', optional: true },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: { tokens: 'u32', channels: 'u32', quads: 'u32' },
  variants: { plain: { files: ['elementwise/from_nchw.wgsl'] } },
});

export const toNchw: Kernel = defineKernel({
  name: 'to_nchw',
  bindings: {
    x: { type: 'array<Quad>', access: 'read_write' },
    out: { type: 'array<f32>', access: 'read_write' },
  },
  params: { tokens: 'u32', channels: 'u32', quads: 'u32' },
  variants: { plain: { files: ['elementwise/to_nchw.wgsl'] } },
});

const plain = { variant: 'plain', choices: {}, constants: {} } as const;

/** x [rows, 2 * inner] -> out [rows, inner]; `inner` a multiple of 4. */
export function gegluOf(args: {
  label: string;
  rows: number;
  inner: number;
  x: Operand;
  out: Operand;
}): Dispatch {
  const { label, rows, inner, x, out } = args;
  return {
    ...plain,
    kernel: geglu,
    operands: { x, out },
    params: { rows, quads: inner / 4 },
    grid: [ceilDiv(inner / 4, 16), ceilDiv(rows, 16), 1],
    label,
    flops: 12 * rows * inner,
  };
}

/** Quads of one row of the copy's grid. */
const COPY_ROW_QUADS = 64 * 1024;

/** `count` stored values, a multiple of 4. */
export function copyOf(args: { label: string; count: number; x: Operand; out: Operand }): Dispatch {
  const { label, count, x, out } = args;
  const quads = count / 4;
  const rowQuads = Math.min(quads, COPY_ROW_QUADS);
  return {
    ...plain,
    kernel: copy,
    operands: { x, out },
    params: { quads, rowQuads },
    grid: [ceilDiv(rowQuads, 64), ceilDiv(quads, rowQuads), 1],
    label,
    flops: 0,
  };
}

export interface LayoutArgs {
  readonly label: string;
  readonly images: number;
  readonly tokens: number;
  /** Channels that exist. */
  readonly channels: number;
  /** Channels that are stored in NHWC, padded with zeros. */
  readonly storedChannels: number;
}

/** src [images, channels, tokens] -> out [images, tokens, storedChannels], plus `add` of out's shape. */
export function fromNchwOf(args: LayoutArgs & { src: Operand; add?: Operand; out: Operand }): Dispatch {
  const { label, images, tokens, channels, storedChannels, src, add, out } = args;
  return {
    ...plain,
    kernel: fromNchw,
    operands: { src, out, ...(add ? { add } : {}) },
    params: { tokens, channels, quads: storedChannels / 4 },
    grid: [ceilDiv(tokens, 64), storedChannels / 4, images],
    label,
    flops: 0,
  };
}

/** x [images, tokens, storedChannels] -> out [images, channels, tokens] in f32. */
export function toNchwOf(args: LayoutArgs & { x: Operand; out: Operand }): Dispatch {
  const { label, images, tokens, channels, storedChannels, x, out } = args;
  return {
    ...plain,
    kernel: toNchw,
    operands: { x, out },
    params: { tokens, channels, quads: storedChannels / 4 },
    grid: [ceilDiv(tokens, 64), storedChannels / 4, images],
    label,
    flops: 0,
  };
}
