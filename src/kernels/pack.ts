/** Weights from a file's layout into panels. Formulas and layouts stand in `shaders/elementwise/` and `shaders/lib/w_*.wgsl`. */
import { ceilDiv, type Dispatch, defineKernel, type Kernel, type Operand } from '../gpu/kernel.ts';
import { BLOCK, PANEL, type WeightFormat } from './panel.ts';

const PARAMS = { rows: 'u32', channels: 'u32', paddedChannels: 'u32', outPanel: 'u32' } as const;
const CONSTANTS = { SRC_DTYPE: 0, TAPS: 1 } as const;

export const pack: Kernel = defineKernel({
  name: 'pack',
  bindings: {
    src: { type: 'array<Source>', access: 'read' },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: PARAMS,
  constants: CONSTANTS,
  variants: {
    words: { files: ['elementwise/src_words.wgsl', 'elementwise/pack.wgsl'] },
    octets: { files: ['elementwise/src_octets.wgsl', 'elementwise/pack_octets.wgsl'] },
  },
});

export const quantise: Kernel = defineKernel({
  name: 'quantise',
  bindings: {
    src: { type: 'array<Source>', access: 'read' },
    out: { type: 'array<vec2u>', access: 'read_write' },
  },
  params: PARAMS,
  constants: CONSTANTS,
  variants: {
    words: { files: ['elementwise/src_words.wgsl', 'elementwise/block.wgsl', 'elementwise/quantise.wgsl'] },
    octets: {
      files: ['elementwise/src_octets.wgsl', 'elementwise/block.wgsl', 'elementwise/quantise_octets.wgsl'],
    },
  },
});

/** Dtypes a file's weights may have, by the code the kernels know them under. */
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
  /** Panels of `out` before the chunk's first one. */
  readonly outPanel: number;
  /** How `out` is stored: Quads unless told. */
  readonly format?: WeightFormat | undefined;
  readonly src: Operand;
  readonly out: Operand;
}

/** Whether a file's rows can be read by octets, for the format that is made of them. */
export const hasOctets = ({
  channels,
  taps,
  format,
}: Pick<PackArgs, 'channels' | 'taps' | 'format'>): boolean =>
  format === 'q8_0' ? taps === 1 && channels % BLOCK === 0 : (channels * taps) % 8 === 0;

/** src [rows, channels, taps] -> out [rows / 32][taps * paddedChannels][32]. */
export function packOf(args: PackArgs, variant?: string): Dispatch {
  const { label, rows, channels, paddedChannels, taps, outPanel, format, src, out } = args;
  const chosen = variant ?? (hasOctets(args) ? 'octets' : 'words');
  const kEach = format === 'q8_0' ? BLOCK : chosen === 'octets' ? 8 : 1;
  return {
    kernel: format === 'q8_0' ? quantise : pack,
    variant: chosen,
    choices: {},
    constants: { SRC_DTYPE: PACK_DTYPES[args.dtype] ?? 0, TAPS: taps },
    operands: { src, out },
    params: { rows, channels, paddedChannels, outPanel },
    grid: [ceilDiv(((taps * paddedChannels) / kEach) * (PANEL / 4), 64), ceilDiv(rows, PANEL), 1],
    label,
    flops: 0,
  };
}
