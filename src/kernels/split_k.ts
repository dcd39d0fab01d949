/**
 * A GEMM of few rows has few tiles and long sums, and leaves most of a GPU idle. Its K is cut into parts, each of them a GEMM
 * without an epilogue whose sums stay in f32, and `gemm_reduce` adds the parts in their order and ends as every GEMM does.
 * Who adds last could not be left to an atomic counter in one dispatch: WGSL orders no memory between workgroups. Parts
 * within a workgroup would need no scratch, but bring no workgroup to an idle multiprocessor. Builds dispatches; owns nothing.
 */
import {
  type Capabilities,
  ceilDiv,
  type Dispatch,
  defineKernel,
  type Kernel,
  type Operand,
} from '../gpu/kernel.ts';
import { EPILOGUE, epilogueConstants, epilogueOperands, epilogueParams, NO_EPILOGUE } from './epilogue.ts';
import {
  columnsOf,
  type GemmArgs,
  type GemmChoice,
  type GemmSizes,
  gemmOf,
  type LoraOperands,
  panelsOf,
  pickGemm,
  TILES,
  tapsOf,
} from './gemm.ts';
import { PANEL } from './panel.ts';

export const gemmReduce: Kernel = defineKernel({
  name: 'gemm_reduce',
  bindings: { partials: { type: 'array<vec4f>', access: 'read_write' }, ...EPILOGUE.bindings },
  params: { ...EPILOGUE.params, kSplits: 'u32', panel0: 'u32', image0: 'u32' },
  constants: EPILOGUE.constants,
  variants: { plain: { files: [...EPILOGUE.files, 'gemm/reduce.wgsl'] } },
});

/**
 * Workgroups that occupy a GPU: two on each of 128 multiprocessors. WebGPU does not tell how many there are; on a smaller GPU
 * there are more parts than it needs, which costs no more than their scratch.
 */
const ENOUGH_WORKGROUPS = 256;
/**
 * Least k of a part. A tile of 64 x 64 reads 256 bytes of halves a k, and its sums are 16 KiB that are written and read again:
 * with less k they would be more than a third of all that it moves.
 */
const LEAST_K = 256;
/**
 * Least k that every workgroup is spared: 8 MFLOP of a tile, what a multiprocessor computes in the 6 to 10 us of one more
 * dispatch.
 */
const LEAST_SAVING = 1024;

/** What else can be measured. */
const OTHERS: readonly number[] = [2, 4, 8, 16];

/**
 * How a layer is computed: as it was measured, or by the rules. They count the tiles of one image, whatever the batch: so sums
 * are added in the same order, and a request gets the same bits, beside any other.
 *
 *   SD 1.5 at 64x64 latents                     rows  columns       k   tiles   parts
 *   8x8:   3x3 convolution over 1280 channels     64    1,280  11,520      20      12
 *          3x3 convolution over 2560 channels     64    1,280  23,040      20      12
 *          projections of a transformer           64    1,280   1,280      20       5
 *   16x16: 3x3 convolution over 1280 channels    256    1,280  11,520      80       3
 *          second layer of a feed-forward        256    1,280   5,120      80       3
 *          projections of a transformer          256    1,280   1,280      80       1
 *   32x32: 3x3 convolution over 640 channels   1,024      640   5,760     160       1
 */
export const gemmChoice = (sizes: GemmSizes, capabilities: Capabilities): GemmChoice =>
  pickGemm(sizes, capabilities, (variant) =>
    splitsOf(sizes, variant, capabilities).map((splits) => (splits > 1 ? { variant, splits } : { variant })),
  );

/** Into how many parts a variant may cut K, first what the rules say. */
function splitsOf(sizes: GemmSizes, variant: string, { software }: Capabilities): readonly number[] {
  const { panels, rows, cutsK } = TILES[variant]!;
  // A software driver has as many multiprocessors as the machine has cores.
  if (!cutsK || software) return [1];
  const tiles = ceilDiv(columnsOf(sizes), panels * PANEL) * ceilDiv(sizes.m, rows);
  const k = tapsOf(sizes.rows) * sizes.channels;
  const most = Math.floor(k / LEAST_K);
  const enough = Math.min(Math.floor(ENOUGH_WORKGROUPS / tiles), most);
  const byRules = enough > 1 && k - k / enough >= LEAST_SAVING ? enough : 1;
  const others = OTHERS.filter((n) => n !== byRules && n <= most && n * tiles <= 2 * ENOUGH_WORKGROUPS);
  return [byRules, ...(byRules === 1 ? [] : [1]), ...others];
}

/** Values of a layer's partial sums. */
export const partialsOf = (
  sizes: Pick<GemmArgs, 'images' | 'm' | 'n' | 'gated'>,
  { splits }: Pick<GemmChoice, 'splits'>,
): number => sizes.images * splits * sizes.m * columnsOf(sizes);

/** A layer as `args.choice` has it, with its low-rank terms or without. */
export function gemmsOf(
  args: GemmArgs,
  capabilities: Capabilities,
  lora?: LoraOperands,
): readonly Dispatch[] {
  const { partials, choice } = args;
  if (!choice || choice.splits === 1) return [gemmOf(args, capabilities, lora)];
  if (!partials) throw new Error(`${args.label}: K is cut, but there is no room for the sums of its parts`);
  const parts: GemmArgs = {
    ...args,
    n: columnsOf(args),
    panels: panelsOf(args) * (args.gated ? 2 : 1),
    out: partials,
    ...NO_EPILOGUE,
  };
  return [gemmOf(parts, capabilities, lora), reduceOf(args, partials, choice)];
}

function reduceOf(args: GemmArgs, partials: Operand, { splits }: GemmChoice): Dispatch {
  const panels = panelsOf(args);
  const columns = columnsOf({ ...args, n: Math.min(panels * PANEL, args.n) });
  return {
    kernel: gemmReduce,
    variant: 'plain',
    decision: args.choice?.decision,
    choices: {},
    constants: epilogueConstants(args),
    operands: { partials, ...epilogueOperands(args) },
    params: { ...epilogueParams(args), kSplits: splits, panel0: args.panel0 ?? 0, image0: 0 },
    grid: [panels, ceilDiv(args.m, 8), args.images],
    imageAxis: 2,
    label: `${args.label} reduce`,
    flops: args.images * args.m * columns * splits,
  };
}
