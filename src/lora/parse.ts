/**
 * The tensors of a LoRA file, grouped by the layer of the UNet that they change, and read as f32. Refuses what has no
 * algebra. Names are in keys.ts; what the numbers mean is algebra.ts.
 */
import { UnetdError } from '../errors.ts';
import { isFloatDtype, toF32 } from '../half.ts';
import type { Layer, UNetConfig } from '../unet/config.ts';
import { ALGEBRA, type Factor } from './algebra.ts';
import { type AdapterKind, type Key, readKey, targetNames } from './keys.ts';

/** What the parser needs of a file: a SafetensorsFile is one. */
export interface AdapterSource {
  readonly tensors: ReadonlyMap<
    string,
    { readonly name: string; readonly dtype: string; readonly shape: readonly number[] }
  >;
  read(name: string): Promise<Uint8Array>;
  digest(): Promise<string>;
}

/** The keys of one layer. */
export interface LayerKeys {
  readonly layer: Layer;
  /** Part -> key of the file. */
  readonly keys: Map<string, string>;
  kind: AdapterKind;
}

export interface SortedKeys {
  readonly groups: ReadonlyMap<string, LayerKeys>;
  readonly formats: ReadonlySet<string>;
  readonly unmatched: readonly string[];
}

/** Bytes of the integer dtypes that some trainers write alpha in. */
const INTEGER_BYTES: ReadonlyMap<string, number> = new Map([
  ['I8', 1],
  ['U8', 1],
  ['I16', 2],
  ['U16', 2],
  ['I32', 4],
  ['U32', 4],
  ['I64', 8],
  ['U64', 8],
]);

/** Groups the keys by layer, in the order of the file. A kind without algebra ends the parse here, before any reading. */
export function sortKeys(source: AdapterSource, config: UNetConfig, adapter: string): SortedKeys {
  const names = targetNames(config);
  const groups = new Map<string, LayerKeys>();
  const formats = new Set<string>();
  const unmatched: string[] = [];
  for (const key of source.tensors.keys()) {
    const found = readKey(key, names);
    if (found !== null && found.kind !== 'any' && !ALGEBRA.has(found.kind)) unsupported(adapter, key, found);
    const layer = found?.target.layer;
    if (found === null || layer === undefined || layer === null) {
      unmatched.push(key);
      continue;
    }
    const group: LayerKeys = groups.get(layer.id) ?? { layer, keys: new Map(), kind: found.kind };
    const other = group.keys.get(found.part);
    if (other !== undefined) {
      throw new UnetdError(
        'ERR_LORA_INVALID',
        `Adapter "${adapter}" is malformed at ${layer.id}: both ${other} and ${key} are its "${found.part}"`,
        { adapter, layer: layer.id, keys: [other, key] },
      );
    }
    if (group.kind === 'any') group.kind = found.kind;
    group.keys.set(found.part, key);
    groups.set(layer.id, group);
    formats.add(found.format);
  }
  // An alpha alone changes nothing.
  for (const [id, { kind, keys }] of groups) {
    if (kind !== 'any') continue;
    unmatched.push(...keys.values());
    groups.delete(id);
  }
  return { groups, formats, unmatched };
}

function unsupported(adapter: string, key: string, { kind, target }: Key): never {
  throw new UnetdError(
    'ERR_LORA_UNSUPPORTED',
    `Adapter "${adapter}" holds ${key}, a ${kind} adapter of ${target.id}; applied are: ${[...ALGEBRA.keys()].join(', ')}`,
    { adapter, key, kind, layer: target.id },
  );
}

/** The tensors of one layer as f32, and its alpha (null where the file states none). ERR_LORA_INVALID. */
export async function readLayer(
  source: AdapterSource,
  { keys }: LayerKeys,
  adapter: string,
): Promise<{ readonly alpha: number | null; readonly parts: ReadonlyMap<string, Factor> }> {
  const parts = new Map<string, Factor>();
  let alpha: number | null = null;
  for (const [part, key] of keys) {
    if (part === 'alpha') alpha = await readAlpha(source, key, adapter);
    else parts.set(part, await readFactor(source, key, adapter));
  }
  return { alpha, parts };
}

async function readFactor(source: AdapterSource, key: string, adapter: string): Promise<Factor> {
  const { dtype, shape } = source.tensors.get(key)!;
  if (!isFloatDtype(dtype)) return badTensor(adapter, key, `it has the dtype ${dtype}, which is no float`);
  const values = toF32(dtype, await source.read(key));
  const at = values.findIndex((value) => !Number.isFinite(value));
  if (at >= 0) badTensor(adapter, key, `its element ${at} is ${values[at]}`);
  return { key, shape, values };
}

async function readAlpha(source: AdapterSource, key: string, adapter: string): Promise<number> {
  const { dtype, shape } = source.tensors.get(key)!;
  if (shape.some((size) => size !== 1))
    badTensor(adapter, key, `an alpha is one number, this has the shape [${shape}]`);
  const bytes = await source.read(key);
  const width = INTEGER_BYTES.get(dtype);
  if (width === undefined && !isFloatDtype(dtype))
    badTensor(adapter, key, `it has the dtype ${dtype}, which is no number`);
  const alpha =
    width === undefined ? toF32(dtype, bytes)[0]! : readInteger(bytes, width, dtype.startsWith('I'));
  return Number.isFinite(alpha) ? alpha : badTensor(adapter, key, `it is ${alpha}`);
}

function readInteger(bytes: Uint8Array, width: number, signed: boolean): number {
  let value = 0n;
  for (let i = width - 1; i >= 0; i--) value = (value << 8n) | BigInt(bytes[i]!);
  return Number(signed ? BigInt.asIntN(width * 8, value) : value);
}

function badTensor(adapter: string, key: string, message: string): never {
  throw new UnetdError('ERR_LORA_INVALID', `Adapter "${adapter}" is malformed: ${key}: ${message}`, {
    adapter,
    key,
  });
}
