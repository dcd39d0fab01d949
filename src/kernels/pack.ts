/** Weights from a file's layout into panels. Formula and layouts stand in `shaders/elementwise/pack.wgsl`. */
import { ceilDiv, type Dispatch, defineKernel, type Kernel, type Operand } from '../gpu/kernel.ts';
import { choiceOf, PANEL, type WeightFormat } from './panel.ts';

export const pack: Kernel = defineKernel({
  name: 'pack',
  bindings: {
    src: { type: 'array<u32>', access: 'read' },
    out: { type: 'array<Weights>', access: 'read_write' },
  },
  params: { rows: 'u32', channels: 'u32', paddedChannels: 'u32', taps: 'u32', outPanel: 'u32' },
  options: { out: { quads: 'elementwise/pack_quads.wgsl', q8_0: 'elementwise/pack_q8_0.wgsl' } },
  constants: { SRC_DTYPE: 0 },
  variants: { plain: { files: ['elementwise/pack.wgsl'] } },
});

/** Dtypes a file's weights may have, by the code the kernel knows them under. */
export const PACK_DTYPES: Readonly<Record<string, number>> = { F32: 0, F16: 1, BF16: 2 };

/** k that an invocation packs, by the choice for `out`. */
const K_EACH = { quads: 1, q8_0: 32 } as const;

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

/** src [rows, channels, taps] -> out [rows / 32][taps * paddedChannels][32]. */
export function packOf(args: PackArgs): Dispatch {
  const { label, rows, channels, paddedChannels, taps, outPanel, format, src, out } = args;
  const choice = choiceOf(format);
  const lanes = ((taps * paddedChannels) / K_EACH[choice]) * (PANEL / 4);
  return {
    kernel: pack,
    variant: 'plain',
    choices: { out: choice },
    constants: { SRC_DTYPE: PACK_DTYPES[args.dtype] ?? 0 },
    operands: { src, out },
    params: { rows, channels, paddedChannels, taps, outPanel },
    grid: [ceilDiv(lanes, 64), ceilDiv(rows, PANEL), 1],
    label,
    flops: 0,
  };
}
