/**
 * Forwards of the demo model whose results are known, because each was run alone before: small ones, with different inputs, sizes and
 * LoRA stacks. No test itself.
 */
import type { Client, Fields, Message } from '../protocol/client.ts';
import { MODEL, type Server, serve } from '../protocol/server.ts';
import { errorOf, f32, type Tensor, type Tensors } from '../protocol/tensors.ts';

export interface Known {
  readonly fields: Fields;
  readonly tensors: Tensors;
  readonly out: Tensor;
}

/** Rounding depends on the batch; another request's row or LoRA is a hundred times as far off at least. */
export const SAME = 1e-4;
const LORAS = ['ink', 'neon', 'terracotta'];

const wave = (count: number, seed: number): number[] =>
  Array.from({ length: count }, (_, i) => Math.sin((i + seed * 1000) * 12.9898) * 1.5);

function tensorsOf(seed: number): Tensors {
  const images = seed % 7 === 6 ? 2 : 1;
  const width = seed % 5 === 4 ? 16 : 8;
  return new Map([
    ['x', f32([images, 3, 8, width], wave(images * 24 * width, seed))],
    [
      'timesteps',
      f32(
        [images],
        Array.from({ length: images }, (_, i) => 37 * seed + i),
      ),
    ],
    ['context', f32([images, 4, 64], wave(images * 256, seed + 50))],
  ]);
}

function fieldsOf(seed: number): Fields {
  const loras = LORAS.filter((_, i) => (seed >> i) & 1).map((name, i) => ({
    lora: `${name}.safetensors`,
    strength: ((seed % 9) - 4) / 3 + i / 2,
  }));
  return { model: MODEL, loras };
}

/** A server, and so many forwards whose results are known of it. */
export async function serveKnown(
  count: number,
): Promise<{ readonly server: Server; readonly known: readonly Known[] }> {
  const server = await serve('--dtype', 'f32', '--log-level', 'warn');
  const client = await server.open();
  const known = await openCatalogue(client, count);
  await client.close();
  return { server, known };
}

/** Runs each alone. */
export async function openCatalogue(client: Client, count: number): Promise<readonly Known[]> {
  const known: Known[] = [];
  for (let seed = 1; seed <= count; seed += 1) {
    const [fields, tensors] = [fieldsOf(seed), tensorsOf(seed)];
    const { error, tensors: answer } = await client.send('forward', fields, tensors);
    if (error !== undefined) throw new Error(`the forward ${seed} was refused: ${error.message}`);
    const out = answer!.get('out')!;
    for (const other of known) {
      if (errorOf(out, other.out) < 100 * SAME) throw new Error(`forward ${seed} gives what another gives`);
    }
    known.push({ fields, tensors, out: { ...out, data: Uint8Array.from(out.data) } });
  }
  return known;
}

/** Null, or what is wrong with the answer to one of them. */
export function faultOf({ error, tensors }: Message, { out }: Known): string | null {
  if (error !== undefined) return `${error.code}: ${error.message}`;
  const off = errorOf(tensors?.get('out'), out);
  return off < SAME ? null : `off by ${off}`;
}
