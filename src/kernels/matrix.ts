/** Variants for matrix units, one for each shape that such units are known to multiply. Data only. */
import type { Capabilities, MatrixShape, VariantSpec } from '../gpu/kernel.ts';

/** By the name of the variants, the best first. All add in f32. */
const SHAPES: Readonly<Record<string, MatrixShape>> = {
  sgm16: { m: 16, n: 16, k: 16, input: 'f16' },
  sgm16x8: { m: 16, n: 8, k: 16, input: 'f16' },
  sgm16x8x8: { m: 16, n: 8, k: 8, input: 'f16' },
  sgm8: { m: 8, n: 8, k: 8, input: 'f16' },
  // Metal multiplies halves into halves only, but f32 into f32.
  sgm8_f32: { m: 8, n: 8, k: 8, input: 'f32' },
};

export const MATRIX_VARIANTS: readonly string[] = Object.keys(SHAPES);

/** One variant a shape; `files` come after the one that says what the factors are. */
export const matrixVariants = (files: readonly string[]): Readonly<Record<string, VariantSpec>> =>
  Object.fromEntries(
    Object.entries(SHAPES).map(([name, matrix]) => [
      name,
      { files: [`lib/factor_${matrix.input}.wgsl`, ...files], matrix },
    ]),
  );

/** The constant LANES of a dispatch with matrix units: lanes of a subgroup of the adapter, where they are known. */
export const lanesOf = (
  variant: VariantSpec | undefined,
  { subgroupSize }: Capabilities,
): Readonly<Record<string, number>> => (variant?.matrix && subgroupSize ? { LANES: subgroupSize } : {});
