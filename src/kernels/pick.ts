/**
 * Which variant of a kernel runs on which adapter: one pure function over a table of rules, and over what was measured on that
 * adapter. Holds no state.
 */
import { isDeepStrictEqual } from 'node:util';
import { type Capabilities, type Choice, type Decision, type Kernel, runsOn } from '../gpu/kernel.ts';
import { MATRIX_VARIANTS } from './matrix.ts';
import { storageOf, type WeightFormat } from './panel.ts';

/** Facts of one use that a choice may depend on. */
export interface Shape {
  /** Of weights, or of activations where none are read; f32, which matrix units for halves would round, unless told. */
  readonly format?: WeightFormat;
  /** How the rows of a GEMM are found. */
  readonly a?: string;
  readonly images?: number;
  /** Rows of an image. */
  readonly rows?: number;
  /** Runs of four output pixels that these rows are, 0 where they are no 3x3 convolution of stride 1. */
  readonly runs?: number;
  readonly columns?: number;
  /** Terms of a sum: taps times channels. */
  readonly depth?: number;
  readonly headDim?: number;
  readonly keys?: number;
}

/** What is chosen, and from what. */
export interface Picked {
  readonly choice: Choice;
  /** Undefined where there was nothing to choose, or no choice. */
  readonly decision?: Decision | undefined;
}

interface Rule {
  readonly variant: string;
  /** What the variant can compute at all; everything unless told. */
  readonly can?: (shape: Shape) => boolean;
  /** Where it is taken without having been measured; wherever it runs unless told. */
  readonly when?: (capabilities: Capabilities, shape: Shape) => boolean;
}

/** Wider heads fill more registers with their sums than a GPU has, and more code than a core keeps at hand. */
const headFits = ({ headDim = 0 }: Shape): boolean => headDim % 4 === 0 && headDim <= 160;

const MATRIX_RULES: readonly Rule[] = MATRIX_VARIANTS.map((variant) => ({
  variant,
  can: headFits,
  // Software drivers only imitate such units.
  when: ({ software }) => !software,
}));

/** So many rows are cheaper in tiles of 8 than in one of 32. */
const FEW_ROWS = 16;

/** The first rule that holds, of a variant that the adapter runs, wins. */
const RULES: Readonly<Record<string, readonly Rule[]>> = {
  gemm: [
    ...MATRIX_RULES,
    // A tile of 8 runs costs 0.8 of one of 32 rows.
    {
      variant: 'winograd',
      can: ({ runs = 0 }) => runs > 0,
      when: (_, { rows = 0, runs = 0 }) =>
        rows > FEW_ROWS && 0.8 * Math.ceil(runs / 8) < Math.ceil(rows / 32),
    },
    // Shuffles from a constant lane are free on a software driver, workgroup memory is not: 37 to 76 against 6 to 11
    // GFLOP/s. The tile of 32 rows is 1.65 times as fast as that of 8, on as many rows as it has.
    { variant: 'broadcast8', when: (_, { rows = 0 }) => rows <= FEW_ROWS },
    { variant: 'broadcast32' },
    { variant: 'tile' },
  ],
  lora_down: [
    // Four blocks per reading of A: 40 to 46 GFLOP/s against 22 to 28.
    { variant: 'broadcast' },
    { variant: 'rows', when: ({ software }) => software },
    { variant: 'row' },
  ],
  attention: [
    { variant: 'scalar', can: ({ headDim = 0 }) => headDim % 4 !== 0 },
    ...MATRIX_RULES,
    { variant: 'broadcast', can: headFits },
    { variant: 'direct', can: ({ headDim = 0 }) => headDim % 4 === 0 },
  ],
  group_norm_moments: [{ variant: 'lanes' }, { variant: 'shared' }],
  layer_norm: [
    // Reads a row once, where its channels fit the registers: 80 to 90 against 60 % of the copy rate.
    { variant: 'held', can: ({ columns = Infinity }) => columns <= 320 && columns % 8 === 0 },
    { variant: 'lanes' },
    { variant: 'shared' },
  ],
};

/** To the nearest power. */
const near =
  (base: number) =>
  (value: number): number =>
    base ** Math.round(Math.log(value) / Math.log(base));
const exact = <T>(value: T): T => value;

/**
 * The facts that make a point, and how coarse each is: what lies between two steps goes with the nearer one. Rows and keys
 * fall by four from one level of a UNet to the next, so that every size of an image has points near its levels.
 */
const FACTS = {
  format: exact<string>,
  a: exact<string>,
  images: near(2),
  rows: near(4),
  columns: near(2),
  depth: near(2),
  headDim: exact<number>,
  keys: near(4),
} as const;

/** `gemm format=f16 a=conv3 images=1 rows=4096 columns=256 depth=2048` */
function pointOf(kernel: Kernel, shape: Shape): string {
  const facts = Object.entries(FACTS) as [keyof typeof FACTS, (value: unknown) => unknown][];
  const known = facts.filter(([name]) => shape[name] !== undefined);
  return [kernel.name, ...known.map(([name, step]) => `${name}=${step(shape[name])}`)].join(' ');
}

/** In which ways a variant can run, first what the rules say. */
export type Ways = (variant: string) => readonly Choice[];

const oneWay: Ways = (variant) => [{ variant }];

/** All that the adapter runs and that can compute this, first what the rules say. */
function candidatesOf(
  kernel: Kernel,
  capabilities: Capabilities,
  shape: Shape,
  ways: Ways,
): readonly Choice[] {
  const storage = storageOf(shape.format ?? 'f32');
  const able = (RULES[kernel.name] ?? []).filter(
    ({ variant, can }) => runsOn(kernel.variants[variant]!, capabilities, storage) && (can?.(shape) ?? true),
  );
  const first = able.find(({ when }) => when?.(capabilities, shape) ?? true);
  const others = able.filter((rule) => rule !== first);
  return [...(first ? [first] : []), ...others].flatMap(({ variant }) => ways(variant));
}

/** `given`, else what was measured at this point where it is a candidate of this very use, else what the rules say. */
export function pick(
  kernel: Kernel,
  capabilities: Capabilities,
  shape: Shape = {},
  given?: string | undefined,
  ways: Ways = oneWay,
): Picked {
  if (given !== undefined) return { choice: { variant: given } };
  const candidates = candidatesOf(kernel, capabilities, shape, ways);
  const [byRules] = candidates;
  if (!byRules) throw new Error(`no rule for the kernel ${kernel.name} holds here`);
  if (candidates.length === 1) return { choice: byRules };
  const point = pointOf(kernel, shape);
  const tuned = capabilities.tuned?.get(point);
  const choice = candidates.find((candidate) => isDeepStrictEqual(candidate, tuned)) ?? byRules;
  return { choice, decision: { point, candidates } };
}
