/**
 * The tensors of a LoRA file, grouped by the tensor of the UNet that they change, and read. Refuses what has no
 * algebra. Names are in keys.ts; what the numbers mean is algebra.ts.
 */
import { UnetdError } from '../errors.ts';
import { fromF32, isFloatDtype, toF32 } from '../half.ts';
import type { UNetConfig } from '../unet/config.ts';
import type { Part } from '../unet/layers.ts';
import { ALGEBRA, FOR_VECTORS } from './algebra.ts';
import type { Dense, Factor, TensorFactors } from './factors.ts';
import { type AdapterKind, type Key, type Leaf, readKey, targetNames } from './keys.ts';

/** What the parser needs of a file: a SafetensorsFile is one. */
export interface AdapterSource {
  readonly tensors: ReadonlyMap<
    string,
    { readonly name: string; readonly dtype: string; readonly shape: readonly number[] }
  >;
  read(name: string): Promise<Uint8Array>;
  digest(): Promise<string>;
}

/** The keys of one tensor of the UNet. */
export interface TensorKeys {
  readonly target: Part;
  readonly leaf: Leaf;
  /** Part -> key of the file. */
  readonly keys: Map<string, string>;
  kind: AdapterKind;
}

export interface SortedKeys {
  readonly groups: ReadonlyMap<string, TensorKeys>;
  readonly formats: ReadonlySet<string>;
  readonly unmatched: readonly string[];
}

/** Parts as large as a weight: kept as the file has them. */
const DENSE: ReadonlySet<string> = new Set(['diff', 'diff_b', 'w_norm', 'b_norm', 'set_weight']);

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

/** Groups the keys by tensor, in the order of the file. A kind without algebra ends the parse here, before any reading. */
export function sortKeys(source: AdapterSource, config: UNetConfig, adapter: string): SortedKeys {
  const names = targetNames(config);
  const groups = new Map<string, TensorKeys>();
  const formats = new Set<string>();
  const unmatched: string[] = [];
  for (const key of source.tensors.keys()) {
    const found = readKey(key, names);
    if (found === null) {
      unmatched.push(key);
      continue;
    }
    checkKind(adapter, key, found);
    const { target, leaf, kind, part } = found;
    const name = `${target.id}.${leaf}`;
    const group: TensorKeys = groups.get(name) ?? { target, leaf, keys: new Map(), kind };
    const other = group.keys.get(part);
    if (other !== undefined) conflict(adapter, group, [other, key], `are its "${part}"`);
    if (group.kind === 'any') group.kind = kind;
    if (kind !== 'any' && kind !== group.kind) {
      const first = [...group.keys.values()].find((known) => readKey(known, names)?.kind === group.kind)!;
      conflict(adapter, group, [first, key], `change the same tensor, as ${group.kind} and as ${kind}`);
    }
    group.keys.set(part, key);
    groups.set(name, group);
    formats.add(found.format);
  }
  checkNorms(adapter, groups);
  // An alpha or a magnitude alone changes nothing.
  for (const [name, { kind, keys }] of groups) {
    if (kind !== 'any') continue;
    unmatched.push(...keys.values());
    groups.delete(name);
  }
  return { groups, formats, unmatched };
}

function checkKind(adapter: string, key: string, { kind, target, leaf }: Key): void {
  if (kind === 'any') return;
  const isVector = leaf === 'bias' || target.kind === 'norm' || target.kind === 'group_norm';
  const applied = isVector ? [...FOR_VECTORS] : [...ALGEBRA.keys()];
  if (applied.includes(kind)) return;
  const name = leaf === 'bias' ? `${target.id}.bias` : target.id;
  throw new UnetdError(
    'ERR_LORA_UNSUPPORTED',
    `Adapter "${adapter}" holds ${key} for ${name}, of the kind ${kind}; applied ${isVector ? 'to biases and norms ' : ''}are: ${applied.join(', ')}`,
    { adapter, key, kind, layer: target.id },
  );
}

function conflict(adapter: string, { target }: TensorKeys, keys: readonly string[], what: string): never {
  throw new UnetdError(
    'ERR_LORA_INVALID',
    `Adapter "${adapter}" is malformed at ${target.id}: both ${keys[0]} and ${keys[1]} ${what}`,
    { adapter, layer: target.id, keys },
  );
}

/** ComfyUI reads a `b_norm` only where there is a `w_norm`. */
function checkNorms(adapter: string, groups: ReadonlyMap<string, TensorKeys>): void {
  for (const { target, keys } of groups.values()) {
    const key = keys.get('b_norm');
    if (key === undefined || groups.get(`${target.id}.weight`)?.keys.has('w_norm')) continue;
    throw new UnetdError(
      'ERR_LORA_INVALID',
      `Adapter "${adapter}" is malformed at ${target.id}: it has ${key}, but no matching "w_norm"`,
      { adapter, layer: target.id, missing: 'w_norm' },
    );
  }
}

/** The tensors that a file holds for one tensor of the UNet, as f32 or, where they are as large as it, as they are. ERR_LORA_INVALID. */
export async function readFactors(
  source: AdapterSource,
  { keys }: TensorKeys,
  adapter: string,
): Promise<Pick<TensorFactors, 'alpha' | 'parts' | 'dense'>> {
  const parts = new Map<string, Factor>();
  const dense = new Map<string, Dense>();
  let alpha: number | null = null;
  for (const [part, key] of keys) {
    if (part === 'alpha') alpha = await readAlpha(source, key, adapter);
    else if (part === 'reshape_weight') parts.set(part, await readIntegers(source, key, adapter));
    else if (DENSE.has(part)) dense.set(part, await readDense(source, key, adapter));
    else parts.set(part, await readFactor(source, key, adapter));
  }
  return { alpha, parts, dense };
}

async function readFactor(source: AdapterSource, key: string, adapter: string): Promise<Factor> {
  const { dtype, shape } = source.tensors.get(key)!;
  return { key, shape, values: finite(adapter, key, dtype, await source.read(key)) };
}

async function readDense(source: AdapterSource, key: string, adapter: string): Promise<Dense> {
  const { dtype, shape } = source.tensors.get(key)!;
  const bytes = await source.read(key);
  const values = finite(adapter, key, dtype, bytes);
  if (dtype === 'F16' || dtype === 'BF16') return { key, shape, dtype, bytes };
  return { key, shape, dtype: 'F32', bytes: fromF32('F32', values) };
}

function finite(adapter: string, key: string, dtype: string, bytes: Uint8Array): Float32Array {
  if (!isFloatDtype(dtype)) return badTensor(adapter, key, `it has the dtype ${dtype}, which is no float`);
  const values = toF32(dtype, bytes);
  const at = values.findIndex((value) => !Number.isFinite(value));
  return at >= 0 ? badTensor(adapter, key, `its element ${at} is ${values[at]}`) : values;
}

/** A shape, written as integers. */
async function readIntegers(source: AdapterSource, key: string, adapter: string): Promise<Factor> {
  const { dtype, shape } = source.tensors.get(key)!;
  const width = INTEGER_BYTES.get(dtype);
  if (width === undefined) return badTensor(adapter, key, `it has the dtype ${dtype}, which is no integer`);
  const bytes = await source.read(key);
  const values = Float32Array.from({ length: bytes.byteLength / width }, (_, i) =>
    readInteger(bytes.subarray(i * width), width, dtype.startsWith('I')),
  );
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
