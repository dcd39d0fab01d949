/**
 * How a GEMM ends: bias, gates, what is added, SiLU, and where columns lie in the result. Formula and layouts stand in
 * `shaders/gemm/store.wgsl`; kernels that end so take their share of a description from here. Data and arithmetic only.
 */
import type { Kernel, Operand } from '../gpu/kernel.ts';

/**
 * How columns lie in a tensor of several layers: segment after segment of so many columns, each [image, m, columns] and
 * `strideQuads` behind the one before.
 */
export interface Segments {
  readonly columns: number;
  readonly strideQuads: number;
}

export interface EpilogueArgs {
  readonly label: string;
  readonly images: number;
  /** Rows of one image (tokens or output pixels). */
  readonly m: number;
  /** Stored output columns, a multiple of 4. */
  readonly n: number;
  readonly out: Operand;
  /** Of `out`; one segment of all columns unless told. */
  readonly segments?: Segments | undefined;
  readonly bias?: Operand | undefined;
  /** Added to the result: [image, m, n], or [image, n] with `addPerImage`, in `addSegments`. */
  readonly add?: Operand | undefined;
  readonly addSegments?: Segments | undefined;
  readonly addPerImage?: boolean | undefined;
  readonly silu?: boolean | undefined;
  /** GEGLU: the layer has 2 * n columns, a multiple of 32 each of values and of gates. */
  readonly gated?: boolean | undefined;
}

/** Stores sums as they are. */
export const NO_EPILOGUE: Omit<EpilogueArgs, 'label' | 'images' | 'm' | 'n' | 'out'> = {
  segments: undefined,
  bias: undefined,
  add: undefined,
  addSegments: undefined,
  addPerImage: undefined,
  silu: undefined,
  gated: undefined,
};

/** The share of a kernel's description; its params also need `image0`. */
export const EPILOGUE: Pick<Kernel, 'bindings' | 'params' | 'constants'> & {
  readonly files: readonly string[];
} = {
  files: ['lib/phi.wgsl', 'gemm/store.wgsl'],
  bindings: {
    bias: { type: 'array<vec4f>', access: 'read', optional: true },
    add: { type: 'array<Quad>', access: 'read_write', optional: true },
    out: { type: 'array<Quad>', access: 'read_write' },
  },
  params: {
    m: 'u32',
    nQuads: 'u32',
    segmentQuads: 'u32',
    segmentStride: 'u32',
    addQuads: 'u32',
    addStride: 'u32',
  },
  constants: { SILU: false, ADD_PER_ROW: true, GATED: false },
};

export const epilogueOperands = ({ out, bias, add }: EpilogueArgs): Record<string, Operand> => ({
  out,
  ...(bias ? { bias } : {}),
  ...(add ? { add } : {}),
});

export const epilogueConstants = ({ silu, addPerImage, gated }: EpilogueArgs): Record<string, boolean> => ({
  ...(silu ? { SILU: true } : {}),
  ...(addPerImage ? { ADD_PER_ROW: false } : {}),
  ...(gated ? { GATED: true } : {}),
});

export function epilogueParams({ m, n, segments, addSegments }: EpilogueArgs): Record<string, number> {
  const whole = { columns: n, strideQuads: 0 };
  const out = segments ?? whole;
  const add = addSegments ?? whole;
  return {
    m,
    nQuads: n / 4,
    segmentQuads: out.columns / 4,
    segmentStride: out.strideQuads,
    addQuads: add.columns / 4,
    addStride: add.strideQuads,
  };
}
