/** Writes files that no engine must load, out of good ones. Test input only. */
import { readFileSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import type { FileSource } from '../../src/engine/types.ts';
import { decode, encode, type TensorView } from '../../src/safetensors.ts';
import { sourceOf } from './setting.ts';

/** A file made of another one's bytes, beside it. */
export function altered(from: FileSource, change: (bytes: Buffer) => Uint8Array): FileSource {
  const source = sourceOf(dirname(from.path), 'bad');
  writeFileSync(source.path, change(readFileSync(from.path)));
  return source;
}

/** A file made of another one's tensors, without those that become null. */
export function edited(from: FileSource, change: (tensor: TensorView) => TensorView | null): FileSource {
  return altered(from, (bytes) =>
    encode([...decode(bytes).tensors.values()].flatMap((tensor) => change(tensor) ?? [])),
  );
}

/** A file of nothing but names and shapes. */
export function named(folder: string, names: Readonly<Record<string, readonly number[]>>): FileSource {
  const source = sourceOf(folder, 'bad');
  const tensors = Object.entries(names).map(([name, shape]) => {
    const data = new Uint8Array(shape.reduce((a, b) => a * b, 1));
    return { name, dtype: 'U8' as const, shape, data };
  });
  writeFileSync(source.path, encode(tensors));
  return source;
}

/** The header of a file with one text in place of another of the same length. */
export const lying = (bytes: Buffer, from: string, to: string): Buffer => {
  const at = bytes.indexOf(from);
  if (at < 0 || from.length !== to.length) throw new Error(`cannot put ${to} for ${from}`);
  const copy = Buffer.from(bytes);
  copy.write(to, at);
  return copy;
};
