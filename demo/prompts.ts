/**
 * The demo's stand-in for a text encoder: the trained context of every prompt word, and the rows a workflow sends.
 * Reads `assets/prompts.safetensors`; knows nothing of sampling or sockets.
 */
import { readFile } from 'node:fs/promises';
import type { ClientTensor } from '../src/client.ts';
import { decode, type SafetensorsView } from '../src/safetensors.ts';
import type { Prompt } from './workflows.ts';

/** Reads a whole safetensors file. */
export async function readTensors(path: string): Promise<SafetensorsView> {
  return decode(await readFile(path), path);
}

/** One named tensor of a file, as the client library wants it. */
export function named(file: SafetensorsView, name: string): ClientTensor {
  const found = file.tensors.get(name);
  if (found === undefined) throw new Error(`no tensor ${JSON.stringify(name)} in the file`);
  const { dtype, shape, data } = found;
  if (dtype !== 'F32' && dtype !== 'F16') throw new Error(`tensor ${name} is ${dtype}, not F32 or F16`);
  return { dtype, shape, data };
}

/**
 * Context [2 * prompts, T, D]: each prompt is its subject's tokens, then its ground's; behind them, as many rows of
 * the empty prompt for classifier-free guidance.
 */
export function contextRows(table: SafetensorsView, prompts: readonly Prompt[]): ClientTensor {
  const empty = named(table, 'empty');
  const words = prompts.flatMap(({ subject, ground }) => [`subject.${subject}`, `ground.${ground}`]);
  return {
    dtype: empty.dtype,
    shape: [2 * prompts.length, ...empty.shape],
    data: Buffer.concat([...words.map((word) => named(table, word).data), ...prompts.map(() => empty.data)]),
  };
}
