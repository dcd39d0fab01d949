/** Which variant of a kernel runs on which adapter: one pure function over a table. Holds no state. */
import { type Capabilities, type Kernel, runsOn, type Storage } from '../gpu/kernel.ts';
import { MATRIX_VARIANTS } from './matrix.ts';

/** Facts of one use that a choice may depend on. */
export interface Shape {
  /** Rows of an image. */
  readonly rows?: number;
  /** Of what is read; f32, which matrix units for halves would round, unless told. */
  readonly storage?: Storage;
  readonly headDim?: number;
  /** Keys of a tile of the attention for 8 lanes, 0 where the head width allows none. */
  readonly tileKeys?: number;
}

interface Rule {
  readonly variant: string;
  readonly when: (capabilities: Capabilities, shape: Shape) => boolean;
}

const always = (): boolean => true;
const lanes8 = (c: Capabilities): boolean => c.subgroupSize === 8;

/** Where the adapter has the units; software drivers only imitate them. */
const MATRIX_RULES: readonly Rule[] = MATRIX_VARIANTS.map((variant) => ({
  variant,
  // Wider heads fill more registers with their sums than a GPU has.
  when: (c, { headDim = 0 }) => !c.software && headDim <= 160,
}));

/** The first rule that holds, of a variant that the adapter runs, wins. */
const RULES: Readonly<Record<string, readonly Rule[]>> = {
  gemm: [
    ...MATRIX_RULES,
    // Shuffles from a constant lane are free on a software driver, workgroup memory is not: 37 to 76 against 6 to 11
    // GFLOP/s. The tile of 32 rows is 1.65 times as fast as that of 8, on as many rows as it has.
    { variant: 'broadcast8', when: (c, { rows = 0 }) => lanes8(c) && rows <= 16 },
    { variant: 'broadcast32', when: lanes8 },
    { variant: 'tile', when: always },
  ],
  lora_down: [
    // Four blocks per reading of A: 40 to 46 GFLOP/s against 22 to 28.
    { variant: 'broadcast', when: lanes8 },
    { variant: 'rows', when: (c) => c.software },
    { variant: 'row', when: always },
  ],
  attention: [
    { variant: 'scalar', when: (_, shape) => (shape.headDim ?? 0) % 4 !== 0 },
    ...MATRIX_RULES,
    { variant: 'broadcast', when: (c, { tileKeys = 0 }) => lanes8(c) && tileKeys > 0 },
    { variant: 'direct', when: always },
  ],
  layer_norm: [
    { variant: 'lanes', when: lanes8 },
    { variant: 'shared', when: always },
  ],
};

export function pick(kernel: Kernel, capabilities: Capabilities, shape: Shape = {}): string {
  const rule = RULES[kernel.name]?.find(
    ({ variant, when }) =>
      runsOn(kernel.variants[variant]!, capabilities, shape.storage ?? 'f32') && when(capabilities, shape),
  );
  return rule?.variant ?? Object.keys(kernel.variants)[0]!;
}
