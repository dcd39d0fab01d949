/** Weights from a file's layout into panels. Formula and layouts stand in `shaders/elementwise/pack.wgsl`. */
import { ceilDiv, type Dispatch, defineKernel, type Kernel, type Operand } from '../gpu/kernel.ts';
import { PANEL } from './gemm.ts';

export const pack: Kernel = defineKernel({
  name: 'pack',
  bindings: {
    src: { type: 'array<u32>', access: 'read' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: { rows: 'u32', channels: 'u32', paddedChannels: 'u32', taps: 'u32', outOffset: 'u32' },
  constants: { WIDTH: PANEL, SRC_DTYPE: 0 },
  variants: { plain: { files: ['elementwise/pack.wgsl'] } },
});

/** Dtypes a file's weights may have, by the code the kernel knows them under. */
export const PACK_DTYPES: Readonly<Record<string, number>> = { F32: 0, F16: 1, BF16: 2 };

export interface PackArgs {
  readonly label: string;
  readonly dtype: string;
  /** Rows (output columns) in this chunk; its first row starts a panel. */
  readonly rows: number;
  readonly channels: number;
  /** `channels` rounded up to 8. */
  readonly paddedChannels: number;
  readonly taps: number;
  /** Quads before the chunk's first panel in `out`. */
  readonly outOffset: number;
  /** Columns of a panel: PANEL for weights, RANK_BLOCK for down matrices. */
  readonly width?: 8 | 32;
  readonly src: Operand;
  readonly out: Operand;
}

/** src [rows, channels, taps] -> out [rows / width][taps * paddedChannels][width], width 32 unless told. */
export function packOf(args: PackArgs): Dispatch {
  const { label, rows, channels, paddedChannels, taps, outOffset, src, out, width = PANEL } = args;
  return {
    kernel: pack,
    variant: 'plain',
    choices: {},
    constants: { SRC_DTYPE: PACK_DTYPES[args.dtype] ?? 0, ...(width === PANEL ? {} : { WIDTH: width }) },
    operands: { src, out },
    params: { rows, channels, paddedChannels, taps, outOffset },
    grid: [ceilDiv(taps * paddedChannels * (width / 4), 64), ceilDiv(rows, width), 1],
    label,
    flops: 0,
  };
}
