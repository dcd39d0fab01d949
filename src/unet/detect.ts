/**
 * From tensor names and shapes to a UNetConfig: SD 1.x, 2.x, SDXL, its refiner, and their distilled and inpainting
 * relatives, in LDM or diffusers layout, alone or inside a checkpoint. Reads no weights and no files.
 */
import { GROUPS } from '../kernels/norm.ts';
import type { UNetConfig } from './config.ts';
import { ldmNames } from './diffusers.ts';
import { partsOf, tensorsOf } from './layers.ts';
import { alteredBy, looksLike } from './recognise.ts';
import { blocksOf, invalid, type Shapes } from './structure.ts';

export type { Shapes } from './structure.ts';

/** How many names a message lists. */
const LISTED = 5;

/** Where the UNet's tensors are in a file: `prefix` stands before each of their names. */
export interface UNetLocation {
  readonly layout: 'ldm' | 'diffusers';
  readonly prefix: string;
}

/** A UNet found in a file. */
export interface FoundUNet extends UNetLocation {
  readonly config: UNetConfig;
  /** LDM name without prefix -> name in the file, for every tensor of the UNet. */
  readonly sources: ReadonlyMap<string, string>;
  /** Names in the file, under the prefix, that this UNet has no use for: worth a line in a log, no error. */
  readonly unused: readonly string[];
}

const PLACES: readonly (UNetLocation & { readonly first: string })[] = [
  { layout: 'ldm', prefix: 'model.diffusion_model.', first: 'input_blocks.0.0.weight' },
  { layout: 'ldm', prefix: 'diffusion_model.', first: 'input_blocks.0.0.weight' },
  { layout: 'ldm', prefix: '', first: 'input_blocks.0.0.weight' },
  { layout: 'diffusers', prefix: '', first: 'conv_in.weight' },
  { layout: 'diffusers', prefix: 'unet.', first: 'conv_in.weight' },
];

/** Where a file with these tensor names holds a UNet, or null. */
export function findUNet(names: Iterable<string>): UNetLocation | null {
  const given = names instanceof Set ? (names as ReadonlySet<string>) : new Set(names);
  for (const { layout, prefix, first } of PLACES) {
    const isUNet = layout === 'ldm' || given.has(`${prefix}time_embedding.linear_1.weight`);
    if (given.has(prefix + first) && isUNet) return { layout, prefix };
  }
  return null;
}

function notAUNet(names: Iterable<string>, why: string): never {
  const kind = looksLike(names);
  const guess = kind === null ? '' : ` It looks like ${kind}.`;
  return invalid(
    `The file is no UNet this program knows: ${why}.${guess} Give a UNet of SD 1.x, SD 2.x or SDXL.`,
    {
      looksLike: kind,
    },
  );
}

/**
 * The UNet in a file with these tensors (name in the file -> shape), whatever its layout and prefix.
 * ERR_MODEL_INVALID: there is none (the message guesses what the file is), or it is incomplete or does not fit together.
 */
export function inspectUNet(file: Shapes): FoundUNet {
  const place = findUNet(file.keys());
  if (place === null)
    return notAUNet(
      file.keys(),
      'it has neither input_blocks.0.0.weight nor conv_in.weight with a time embedding',
    );
  const inside = [...file.keys()].filter((name) => name.startsWith(place.prefix));
  const bare = inside.map((name) => name.slice(place.prefix.length));
  refuseAltered(bare);
  const renamed = place.layout === 'ldm' ? new Map(bare.map((name) => [name, name])) : ldmNames(bare);
  const shapes = new Map([...renamed].map(([ldm, name]) => [ldm, file.get(place.prefix + name)!]));
  if (place.layout === 'diffusers' && looksLike(bare) !== null)
    notAUNet(bare, 'it has tensors of another kind');
  const config = detectUNet(shapes);
  const sources = new Map<string, string>();
  for (const name of tensorsOf(config).keys()) sources.set(name, place.prefix + renamed.get(name)!);
  const used = new Set(sources.values());
  return { ...place, config, sources, unused: inside.filter((name) => !used.has(name)) };
}

function refuseAltered(names: Iterable<string>): void {
  const altered = alteredBy(names);
  if (altered === null) return;
  invalid(
    `The file holds ${altered.what} (${altered.name}), which this program does not apply; give plain F16, BF16 or F32 weights of an image UNet`,
    altered,
  );
}

/**
 * The config of a UNet from the shapes of its tensors, by LDM name without prefix (`input_blocks.0.0.weight`).
 * Tensors that the structure does not need are allowed.
 * ERR_MODEL_INVALID: no such UNet (the message guesses what it is), tensors missing, or shapes that do not fit.
 */
export function detectUNet(shapes: Shapes): UNetConfig {
  refuseAltered(shapes.keys());
  const first = need(shapes, 'input_blocks.0.0.weight', 4, 'first convolution');
  const last = need(shapes, 'out.2.weight', 4, 'last convolution');
  const time = need(shapes, 'time_embed.0.weight', 2, 'time embedding');
  const label = shapes.get('label_emb.0.0.weight');
  if (label?.length !== 2 && [...shapes.keys()].some((name) => name.startsWith('label_emb.'))) {
    notAUNet(shapes.keys(), 'its label embedding is no linear layer (label_emb.0.0.weight)');
  }
  const contextDim = [...shapes].find(
    ([name, shape]) => name.endsWith('.transformer_blocks.0.attn2.to_k.weight') && shape.length === 2,
  )?.[1][1];
  if (contextDim === undefined) return notAUNet(shapes.keys(), 'it has no cross-attention (attn2.to_k)');
  const config: UNetConfig = {
    inChannels: first[1]!,
    outChannels: last[0]!,
    modelChannels: first[0]!,
    timeEmbedDim: time[0]!,
    contextDim,
    admChannels: label?.[1] ?? null,
    ...blocksOf(shapes, contextDim),
  };
  validate(config, shapes);
  return config;
}

function need(shapes: Shapes, name: string, dimensions: number, what: string): readonly number[] {
  const shape = shapes.get(name);
  return shape?.length === dimensions ? shape : notAUNet(shapes.keys(), `it has no ${what} (${name})`);
}

function listed(names: readonly string[]): string {
  const rest = names.length - LISTED;
  return `${names.slice(0, LISTED).join(', ')}${rest > 0 ? ` and ${rest} more` : ''}`;
}

/** Every tensor that the config needs exists with its shape, and the norms divide into their groups. */
function validate(config: UNetConfig, shapes: Shapes): void {
  const expected = tensorsOf(config);
  const absent = [...expected.keys()].filter((name) => !shapes.has(name));
  if (absent.length > 0) {
    const count = `of the ${expected.size} tensors it needs ${absent.length} ${absent.length === 1 ? 'is' : 'are'} missing`;
    invalid(`The UNet is incomplete: ${count}: ${listed(absent)}; download or convert the file again`, {
      missing: absent.slice(0, 100),
      count: absent.length,
    });
  }
  const wrong: string[] = [];
  for (const [name, shape] of expected) {
    const got = shapes.get(name)!;
    if (got.join() !== shape.join())
      wrong.push(`${name}: expected [${shape.join(', ')}], got [${got.join(', ')}]`);
  }
  if (wrong.length > 0) {
    const more = wrong.length > 1 ? ` (and ${wrong.length - 1} more tensors)` : '';
    invalid(`The UNet's shapes do not fit together: ${wrong[0]}${more}`, {
      wrong: wrong.slice(0, 20),
      count: wrong.length,
    });
  }
  for (const { id, kind, outFeatures } of partsOf(config)) {
    if (kind === 'group_norm' && outFeatures % GROUPS !== 0) {
      invalid(`${id} normalises ${outFeatures} channels, which do not divide into ${GROUPS} groups`);
    }
  }
}
