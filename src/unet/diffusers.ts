/**
 * Names of a UNet's modules in Hugging Face diffusers (UNet2DConditionModel) and in LDM, both ways. Diffusers groups
 * blocks by resolution, LDM numbers them through. Names only: shapes and layouts of the tensors are the same.
 */
import type { UNetConfig } from './config.ts';
import { partsOf, partsOfModule } from './layers.ts';

/** Which of its two names diffusers gives `label_emb`: SDXL and refiner `add_embedding`, unCLIP `class_embedding`. */
export type LabelName = 'add_embedding' | 'class_embedding';

/** Leaf modules of a ResBlock, [LDM, diffusers]. */
const RES: readonly (readonly [string, string])[] = [
  ['in_layers.0', 'norm1'],
  ['in_layers.2', 'conv1'],
  ['emb_layers.1', 'time_emb_proj'],
  ['out_layers.0', 'norm2'],
  ['out_layers.3', 'conv2'],
  ['skip_connection', 'conv_shortcut'],
];

/** Leaf modules outside of the blocks, [LDM, diffusers]. */
const ENDS: readonly (readonly [string, string])[] = [
  ['time_embed.0', 'time_embedding.linear_1'],
  ['time_embed.2', 'time_embedding.linear_2'],
  ['label_emb.0.0', 'add_embedding.linear_1'],
  ['label_emb.0.2', 'add_embedding.linear_2'],
  ['label_emb.0.0', 'class_embedding.linear_1'],
  ['label_emb.0.2', 'class_embedding.linear_2'],
  ['input_blocks.0.0', 'conv_in'],
  ['out.0', 'conv_norm_out'],
  ['out.2', 'conv_out'],
];

/** LDM module id -> diffusers module id, e.g. `input_blocks.4.1` -> `down_blocks.1.attentions.0`. */
function moduleNames(config: UNetConfig): ReadonlyMap<string, string> {
  const names = new Map<string, string>();
  let group = 0;
  let row = 0;
  for (const modules of config.input.slice(1)) {
    for (const { kind, id } of modules) {
      if (kind === 'res') names.set(id, `down_blocks.${group}.resnets.${row}`);
      else if (kind === 'transformer') names.set(id, `down_blocks.${group}.attentions.${row}`);
      else if (kind === 'down') names.set(id, `down_blocks.${group}.downsamplers.0`);
    }
    const ends = modules.some(({ kind }) => kind === 'down');
    group += ends ? 1 : 0;
    row = ends ? 0 : row + 1;
  }
  const seen = { res: 0, transformer: 0 };
  for (const { kind, id } of config.middle) {
    if (kind === 'res') names.set(id, `mid_block.resnets.${seen.res++}`);
    else if (kind === 'transformer') names.set(id, `mid_block.attentions.${seen.transformer++}`);
  }
  group = 0;
  row = 0;
  for (const modules of config.output) {
    for (const { kind, id } of modules) {
      if (kind === 'res') names.set(id, `up_blocks.${group}.resnets.${row}`);
      else if (kind === 'transformer') names.set(id, `up_blocks.${group}.attentions.${row}`);
      else if (kind === 'up') names.set(id, `up_blocks.${group}.upsamplers.0`);
    }
    const ends = modules.some(({ kind }) => kind === 'up');
    group += ends ? 1 : 0;
    row = ends ? 0 : row + 1;
  }
  return names;
}

/**
 * LDM name -> diffusers name, for every tensor (`out.2.weight` -> `conv_out.weight`) and for every leaf module
 * (`out.2` -> `conv_out`), norms included.
 */
export function diffusersNames(
  config: UNetConfig,
  label: LabelName = 'add_embedding',
): ReadonlyMap<string, string> {
  const names = new Map<string, string>();
  const add = (ldm: string, diffusers: string): void => {
    names.set(ldm, diffusers);
    names.set(`${ldm}.weight`, `${diffusers}.weight`);
    names.set(`${ldm}.bias`, `${diffusers}.bias`);
  };
  const modules = moduleNames(config);
  const resName = new Map(RES);
  for (const module of [...config.input.flat(), ...config.middle, ...config.output.flat()]) {
    const name = modules.get(module.id);
    if (name === undefined) continue;
    for (const { id } of partsOfModule(module, config.timeEmbedDim)) {
      const rest = id.slice(module.id.length + 1);
      if (module.kind === 'res') add(id, `${name}.${resName.get(rest)!}`);
      else add(id, module.kind === 'down' ? `${name}.conv` : `${name}.${rest}`);
    }
  }
  const parts = partsOf(config);
  for (const [ldm, diffusers] of ENDS) {
    const isOtherLabel = ldm.startsWith('label_emb.') && !diffusers.startsWith(label);
    if (!isOtherLabel && parts.some(({ id }) => id === ldm)) add(ldm, diffusers);
  }
  for (const { id, bias } of parts) if (!bias) names.delete(`${id}.bias`);
  return names;
}

/** How many resnets a down or up block has, whether it ends in a sampler, and which LDM block is its first. */
interface Group {
  readonly first: number;
  readonly resnets: number;
}

function groupsOf(names: ReadonlySet<string>, side: 'down' | 'up', first: number): readonly Group[] {
  const groups: Group[] = [];
  let next = first;
  for (let index = 0; ; index++) {
    const prefix = `${side}_blocks.${index}`;
    let resnets = 0;
    while (names.has(`${prefix}.resnets.${resnets}.conv1.weight`)) resnets++;
    if (resnets === 0) return groups;
    groups.push({ first: next, resnets });
    // A downsampler is a block of its own, an upsampler the last module of the last block.
    next += resnets + (names.has(`${prefix}.downsamplers.0.conv.weight`) ? 1 : 0);
  }
}

/**
 * LDM name -> the given name, for every name of a diffusers layout that has an LDM name. The structure is read off the
 * names themselves, so no config is needed; whether the result is a whole UNet is for `detectUNet` to say.
 */
export function ldmNames(names: Iterable<string>): ReadonlyMap<string, string> {
  const given = new Set(names);
  const down = groupsOf(given, 'down', 1);
  const up = groupsOf(given, 'up', 0);
  const middleHasAttention = given.has('mid_block.attentions.0.norm.weight');
  const out = new Map<string, string>();
  for (const name of given) {
    const ldm = endName(name) ?? blockName(name, { down, up, middleHasAttention, given });
    if (ldm !== null) out.set(ldm, name);
  }
  return out;
}

function endName(name: string): string | null {
  for (const [ldm, diffusers] of ENDS) {
    if (name === `${diffusers}.weight` || name === `${diffusers}.bias`)
      return ldm + name.slice(diffusers.length);
  }
  return null;
}

interface Layout {
  readonly down: readonly Group[];
  readonly up: readonly Group[];
  readonly middleHasAttention: boolean;
  readonly given: ReadonlySet<string>;
}

const BLOCK =
  /^(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)$/;

function blockName(name: string, { down, up, middleHasAttention, given }: Layout): string | null {
  const match = BLOCK.exec(name);
  if (match === null) return null;
  const [, side, index, kind, rowText, rest] = match;
  const row = Number(rowText);
  const tail = kind === 'resnets' ? resTail(rest!) : rest!;
  if (tail === null) return null;
  if (side === undefined) {
    if (kind === 'resnets') return `middle_block.${middleHasAttention ? 2 * row : row}.${tail}`;
    return kind === 'attentions' ? `middle_block.${2 * row + 1}.${tail}` : null;
  }
  const group = (side === 'down' ? down : up)[Number(index)];
  if (group === undefined) return null;
  const blocks = side === 'down' ? 'input_blocks' : 'output_blocks';
  if (kind === 'resnets') return `${blocks}.${group.first + row}.0.${tail}`;
  if (kind === 'attentions') return `${blocks}.${group.first + row}.1.${tail}`;
  if (row !== 0 || !tail.startsWith('conv.')) return null;
  if (side === 'down')
    return `input_blocks.${group.first + group.resnets}.0.op.${tail.slice('conv.'.length)}`;
  const last = group.resnets - 1;
  const attends = given.has(`up_blocks.${index}.attentions.${last}.norm.weight`);
  return `output_blocks.${group.first + last}.${attends ? 2 : 1}.${tail}`;
}

/** `conv1.weight` -> `in_layers.2.weight`. */
function resTail(tail: string): string | null {
  for (const [ldm, diffusers] of RES)
    if (tail.startsWith(`${diffusers}.`)) return ldm + tail.slice(diffusers.length);
  return null;
}
