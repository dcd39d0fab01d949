/**
 * Reads the blocks of a UNet off the tensor names that exist, following channels and sizes. Looks at few shapes: that
 * all the others agree is checked by detect.ts, which is also what callers use.
 */
import { UnetdError } from '../errors.ts';
import type { UNetConfig, UNetModule } from './config.ts';

export type Shapes = ReadonlyMap<string, readonly number[]>;

/** Heads of an attention behind a convolutional proj_in (SD 1.x). */
const CONV_HEADS = 8;
/** Width of a head behind a linear proj_in (SD 2.x, SDXL, refiner, SSD-1B, Vega, KOALA). */
const LINEAR_HEAD_DIM = 64;

interface Skip {
  readonly block: string;
  readonly channels: number;
  readonly level: number;
}

interface Walk {
  readonly shapes: Shapes;
  /** Every path that has tensors below it, e.g. `input_blocks.1.0`. */
  readonly paths: ReadonlySet<string>;
  /** Path -> the numbers that stand directly below it, e.g. `input_blocks.1` -> 0, 1. */
  readonly numbered: ReadonlyMap<string, ReadonlySet<number>>;
  readonly contextDim: number;
  readonly skips: Skip[];
  channels: number;
  /** Halvings of the latent's size. */
  level: number;
}

export function invalid(message: string, details: Readonly<Record<string, unknown>> = {}): never {
  throw new UnetdError('ERR_MODEL_INVALID', message, details);
}

/** The blocks of a UNet. ERR_MODEL_INVALID where they do not form one. */
export function blocksOf(
  shapes: Shapes,
  contextDim: number,
): Pick<UNetConfig, 'input' | 'middle' | 'output'> {
  const paths = new Set<string>();
  const numbered = new Map<string, Set<number>>();
  for (const name of shapes.keys()) {
    for (let dot = name.indexOf('.'); dot >= 0; dot = name.indexOf('.', dot + 1)) {
      const path = name.slice(0, dot);
      if (paths.has(path)) continue;
      paths.add(path);
      const [, parent, index] = /^(.+)\.(\d{1,6})$/.exec(path) ?? [];
      if (parent === undefined) continue;
      const below = numbered.get(parent) ?? new Set();
      numbered.set(parent, below.add(Number(index)));
    }
  }
  const walk: Walk = { shapes, paths, numbered, contextDim, skips: [], channels: 0, level: 0 };
  const input = children(walk, 'input_blocks').map((block) => inputBlock(walk, block));
  const middle = modulesOf(walk, 'middle_block');
  const output = children(walk, 'output_blocks').map((block) => outputBlock(walk, block));
  const rest = walk.skips.at(-1);
  if (rest !== undefined)
    invalid(`The skip of ${rest.block} has no output block: there are only ${output.length}`);
  return { input, middle, output };
}

/** `prefix.0`, `prefix.1`, ... as far as they exist; a gap is an error. */
function children(walk: Walk, prefix: string): readonly string[] {
  const indices = walk.numbered.get(prefix) ?? new Set();
  return Array.from(indices, (_, index) => {
    const child = `${prefix}.${index}`;
    if (!walk.paths.has(child)) {
      const last = [...indices].reduce((most, other) => Math.max(most, other), 0);
      invalid(`The UNet is incomplete: ${child} is missing, but ${prefix}.${last} is there`);
    }
    return child;
  });
}

function inputBlock(walk: Walk, block: string): readonly UNetModule[] {
  const modules = modulesOf(walk, block);
  walk.skips.push({ block, channels: walk.channels, level: walk.level });
  return modules;
}

function outputBlock(walk: Walk, block: string): readonly UNetModule[] {
  const skip = walk.skips.pop();
  if (skip === undefined)
    return invalid(`${block} has no skip: there are more output blocks than input blocks`);
  if (skip.level !== walk.level) {
    const here = `${block} works at 1/${2 ** walk.level} of the size`;
    return invalid(
      `${here}, its skip ${skip.block} at 1/${2 ** skip.level}: an upsampling layer is missing or extra`,
    );
  }
  walk.channels += skip.channels;
  return modulesOf(walk, block);
}

function modulesOf(walk: Walk, block: string): readonly UNetModule[] {
  return children(walk, block).map((id) => moduleAt(walk, id));
}

function moduleAt(walk: Walk, id: string): UNetModule {
  const inChannels = walk.channels;
  const res = walk.shapes.get(`${id}.in_layers.2.weight`);
  if (res?.length === 4) {
    walk.channels = res[0]!;
    return { kind: 'res', id, inChannels, outChannels: walk.channels };
  }
  if (walk.paths.has(`${id}.transformer_blocks`)) return transformer(walk, id);
  if (walk.paths.has(`${id}.op`)) {
    walk.level++;
    return { kind: 'down', id, channels: inChannels };
  }
  if (walk.paths.has(`${id}.conv`)) {
    if (walk.level === 0) invalid(`${id} upsamples past the size of the input`);
    walk.level--;
    return { kind: 'up', id, channels: inChannels };
  }
  const own = walk.shapes.get(`${id}.weight`);
  if (own?.length === 4) {
    walk.channels = own[0]!;
    return {
      kind: 'conv',
      id,
      inChannels: id === 'input_blocks.0.0' ? own[1]! : inChannels,
      outChannels: own[0]!,
    };
  }
  const found = [...walk.shapes.keys()].filter((name) => name.startsWith(`${id}.`));
  return invalid(`${id} is no module this program knows; its tensors are ${found.slice(0, 5).join(', ')}`, {
    module: id,
  });
}

/**
 * Heads are in no tensor's shape. All UNets of these families follow one rule: a linear proj_in comes with heads 64
 * wide, a convolutional proj_in with 8 heads.
 */
function transformer(walk: Walk, id: string): UNetModule {
  const { channels, contextDim } = walk;
  const projection = walk.shapes.get(`${id}.proj_in.weight`);
  if (projection === undefined)
    return invalid(`The UNet is incomplete: ${id}.proj_in.weight is missing`, { module: id });
  const linearProjection = projection.length === 2;
  const heads = linearProjection ? channels / LINEAR_HEAD_DIM : CONV_HEADS;
  const headDim = channels / heads;
  if (!Number.isInteger(heads) || !Number.isInteger(headDim) || channels === 0) {
    const rule = linearProjection ? `heads ${LINEAR_HEAD_DIM} wide` : `${CONV_HEADS} heads`;
    return invalid(`${id} has ${channels} channels, which do not divide into ${rule}`, { module: id });
  }
  const depth = children(walk, `${id}.transformer_blocks`).length;
  return { kind: 'transformer', id, channels, depth, heads, headDim, contextDim, linearProjection };
}
