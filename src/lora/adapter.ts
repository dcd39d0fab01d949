/**
 * A LoRA file as an Adapter: its low-rank terms and its patches, by LDM names, in the layouts that the kernels take. Holds no
 * strengths (those come with each request) and no GPU memory; how files are read is parse.ts, the algebra algebra.ts.
 */
import { extname } from 'node:path';
import { UnetdError } from '../errors.ts';
import { digest, SafetensorsFile, type SafetensorsView } from '../safetensors.ts';
import type { UNetConfig } from '../unet/config.ts';
import { ALGEBRA } from './algebra.ts';
import { architectureOf, trainedFor } from './architecture.ts';
import { type AdapterLayer, type AdapterPatch, arrayBytes, blocksArray, type Changes } from './change.ts';
import { isTextEncoderKey } from './keys.ts';
import { type AdapterSource, readFactors, sortKeys, type TensorKeys } from './parse.ts';

export type { AdapterLayer, AdapterPatch } from './change.ts';

export interface Adapter {
  /** Lower-case hex SHA-256 of the file's tensors, as docs/PROTOCOL.md defines it. */
  readonly digest: string;
  /** How the file names its layers: `kohya`, `peft`, `diffusers`, `ldm`, `lycoris`; joined by `+` where it mixes them. */
  readonly format: string;
  /** Largest rank of a layer. */
  readonly rank: number;
  /** Low-rank terms of layers' own matmuls. */
  readonly layers: readonly AdapterLayer[];
  /** Changes of weights, biases and norms that are no such terms. */
  readonly patches: readonly AdapterPatch[];
  /** Keys of the file that those were made of. */
  readonly matched: readonly string[];
  /** Keys that name nothing in this model: text encoders, layers of another architecture, unknown tensors. */
  readonly unmatched: readonly string[];
  /** Those of the unmatched keys that belong to a text encoder, which is the caller's. */
  readonly textEncoder: readonly string[];
  /** Bytes of all arrays as held here. */
  readonly sizeBytes: number;
}

const PICKLES: ReadonlySet<string> = new Set(['.pt', '.pth', '.ckpt', '.bin', '.pkl']);

/** Several matrices of most files, and no more than a few milliseconds of work on them at a time. */
const AHEAD_BYTES = 256 * 1024;

/**
 * Opens and parses a LoRA file. Errors of `parseAdapter`; ERR_SAFETENSORS where it is written to meanwhile;
 * ERR_LORA_UNSUPPORTED for pickles (`.pt`, `.ckpt`, `.bin`), which are refused by name, unopened. `name` is what messages call
 * it, the file's own name unless told.
 */
export async function openAdapter(path: string, config: UNetConfig, name?: string): Promise<Adapter> {
  const extension = extname(path).toLowerCase();
  if (PICKLES.has(extension)) {
    throw new UnetdError(
      'ERR_LORA_UNSUPPORTED',
      `${extension} files are Python pickles, which can run code when opened, so they are never opened; convert the LoRA to .safetensors`,
      { extension },
    );
  }
  const file = await SafetensorsFile.open(path, AHEAD_BYTES);
  try {
    const adapter = await parseAdapter(file, config, name);
    // Else matrices of one version would be known by the digest of another, to all who name that digest.
    await file.checkUnchanged();
    return adapter;
  } finally {
    await file.close();
  }
}

/**
 * The adapter in a LoRA file, bound to the layers of a UNet. `name` is what messages call it.
 * ERR_LORA_INVALID: matrices are missing or do not fit each other. ERR_LORA_UNSUPPORTED: the file holds a kind that is not
 * applied, on a layer of this UNet. ERR_LORA_MISMATCH: shapes do not fit the UNet, or no key names a layer of it.
 */
export async function parseAdapter(
  file: SafetensorsFile | SafetensorsView,
  config: UNetConfig,
  name?: string,
): Promise<Adapter> {
  const source = file instanceof SafetensorsFile ? file : viewSource(file);
  const adapter = name ?? (file instanceof SafetensorsFile ? file.name : 'unnamed');
  const { groups, formats, unmatched } = sortKeys(source, config, adapter);
  const family = trainedFor(source.tensors.values());
  const open = architectureOf(config);
  if (groups.size === 0) nothingMatches(adapter, [...source.tensors.keys()], family, open);
  const origin =
    family === null || family === open
      ? ''
      : `; this adapter was trained for ${family}, the open model is ${open}`;
  const all: Changes[] = [];
  for (const group of groups.values()) all.push(await bind(source, group, adapter, origin));
  const layers = all.flatMap((changes) => changes.layers);
  const patches = all.flatMap((changes) => changes.patches);
  const arrays = [...layers.map(blocksArray), ...patches.flatMap((patch) => Object.values(patch.arrays))];
  return {
    digest: await source.digest(),
    format: [...formats].join('+'),
    rank: [...layers, ...patches].reduce((most, { rank }) => Math.max(most, rank), 0),
    layers,
    patches,
    matched: [...groups.values()].flatMap(({ keys }) => [...keys.values()]),
    unmatched,
    textEncoder: unmatched.filter(isTextEncoderKey),
    sizeBytes: arrays.reduce((sum, array) => sum + arrayBytes(array), 0),
  };
}

function viewSource({ tensors }: SafetensorsView): AdapterSource {
  return {
    tensors,
    read: async (key) => tensors.get(key)!.data,
    digest: async () => digest(tensors.values()),
  };
}

function nothingMatches(
  adapter: string,
  keys: readonly string[],
  family: string | null,
  open: string,
): never {
  const encoder = keys.filter(isTextEncoderKey).length;
  const why =
    keys.length === 0
      ? 'the file is empty'
      : encoder === keys.length
        ? `all its ${keys.length} keys are of text encoders`
        : family !== null && family !== open
          ? `it was trained for ${family}`
          : `its keys look like ${keys.find((key) => !isTextEncoderKey(key))}`;
  throw new UnetdError(
    'ERR_LORA_MISMATCH',
    `No key of adapter "${adapter}" names a layer of the open model, which is ${open}: ${why}`,
    { adapter, keys: keys.length, trainedFor: family, model: open },
  );
}

async function bind(
  source: AdapterSource,
  group: TensorKeys,
  adapter: string,
  origin: string,
): Promise<Changes> {
  const { target, leaf, kind } = group;
  const factors = await readFactors(source, group, adapter);
  return ALGEBRA.get(kind)!({ ...factors, target, leaf, adapter, origin });
}
