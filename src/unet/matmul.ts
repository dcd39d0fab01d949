/**
 * Layers as matmuls: weights that exceed a binding are split, and layers that read one tensor become one step with their
 * low-rank form. Builds dispatches from arguments; allocates no tensors and knows no layer by name.
 */
import {
  alignTo,
  type Capabilities,
  ceilDiv,
  type Operand,
  type Storage,
  storageBytes,
} from '../gpu/kernel.ts';
import type { Step } from '../gpu/plan.ts';
import type { Segments } from '../kernels/epilogue.ts';
import { type GemmArgs, type LoraOperands, loraDownOf } from '../kernels/gemm.ts';
import { PANEL, panelBytes, panelsPerBinding, type WeightFormat } from '../kernels/panel.ts';
import { gemmsOf } from '../kernels/split_k.ts';

/** A packed weight matrix, [panels][k][32], and its layer's LoRA slot. */
export interface Matrix {
  readonly slot: number;
  readonly format: WeightFormat;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly kernel: number;
  /** The bytes `offset .. offset + sizeBytes` of the packed matrix. */
  readonly range: (offset: number, sizeBytes: number) => Operand;
}

/** A layer as one matmul, or as several where a binding cannot hold its weights. */
export interface Matmul {
  readonly slot: number;
  readonly parts: readonly GemmArgs[];
}

export function matmulOf(
  matrix: Matrix,
  args: Omit<GemmArgs, 'w' | 'format'>,
  capabilities: Capabilities,
): Matmul {
  const { format } = matrix;
  const bytes = panelBytes(matrix.kernel ** 2 * args.channels, format);
  const panels = ceilDiv(matrix.outFeatures, PANEL);
  const most = panelsPerBinding(panels, bytes, capabilities);
  const parts: GemmArgs[] = [];
  for (let panel0 = 0; panel0 < panels; panel0 += most) {
    const count = Math.min(most, panels - panel0);
    const w = matrix.range(panel0 * bytes, count * bytes);
    parts.push({ ...args, w, format, panel0, panels: args.gated ? count / 2 : count });
  }
  return { slot: matrix.slot, parts };
}

const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b));

/**
 * Where the outputs of layers of such widths lie in one tensor: in segments so narrow that every layer has whole ones, each
 * where a binding may start.
 */
export function segmentsOf(
  widths: readonly number[],
  rows: number,
  storage: Storage,
  { offsetAlignment }: Capabilities,
): {
  readonly segments: Segments;
  readonly ranges: readonly { readonly offset: number; readonly sizeBytes: number }[];
  readonly sizeBytes: number;
} {
  const columns = widths.reduce(gcd);
  const strideBytes = alignTo(rows * columns * storageBytes(storage), offsetAlignment);
  let end = 0;
  const ranges = widths.map((width) => {
    const sizeBytes = (width / columns) * strideBytes;
    end += sizeBytes;
    return { offset: end - sizeBytes, sizeBytes };
  });
  const segments = { columns, strideQuads: strideBytes / (4 * storageBytes(storage)) };
  return { segments, ranges, sizeBytes: end };
}

/** Layers that read one tensor as the one matrix that their weights are, and as they run where each needs its own. */
export const bundleStep = (
  { parts }: Matmul,
  layers: readonly string[],
  apart: readonly Step[],
  capabilities: Capabilities,
): Step => ({
  kind: 'bundle',
  slots: apart.flatMap((step) => (step.kind === 'slots' ? step.slots.map(({ slot }) => slot) : [])),
  tensors: layers.flatMap((id) => [`${id}.weight`, `${id}.bias`]),
  together: parts.flatMap((part) => gemmsOf(part, capabilities)),
  apart,
});

/** The steps of layers that read one tensor: one down projection makes the low-rank terms of them all. */
export function stepsOf(
  layers: readonly [Matmul, ...Matmul[]],
  capabilities: Capabilities,
  lora: ((slot: number) => LoraOperands) | undefined,
): readonly Step[] {
  const gemms = ({ parts }: Matmul, terms?: LoraOperands) =>
    parts.flatMap((part) => gemmsOf(part, capabilities, terms));
  if (!lora)
    return layers.flatMap((layer) => gemms(layer).map((dispatch) => ({ kind: 'always', dispatch }) as const));
  const [first] = layers;
  return [
    {
      kind: 'slots',
      down: loraDownOf(first.parts[0]!, capabilities, lora(first.slot)),
      slots: layers.map((layer) => ({
        slot: layer.slot,
        base: gemms(layer),
        main: gemms(layer, lora(layer.slot)),
      })),
    },
  ];
}
