/**
 * The small forward that the tests vary: one image of 8x8, a few milliseconds, for what needs no reference. It says how to send
 * it and what its answer must look like; it starts no server and holds no client.
 */
import { expect } from 'vitest';
import type { Client, Fields, Message } from './client.ts';
import { MODEL } from './server.ts';
import { f32, type Tensor, type Tensors } from './tensors.ts';

export const noise = (count: number): number[] =>
  Array.from({ length: count }, (_, i) => Math.sin(i * 12.9898) * 1.5);

export const small: Tensors = new Map([
  ['x', f32([1, 3, 8, 8], noise(192))],
  ['timesteps', f32([1], [500])],
  ['context', f32([1, 4, 64], noise(256))],
]);

/** The small request with some tensors changed; null leaves one out. */
export function changed(changes: Readonly<Record<string, Tensor | null>>): Tensors {
  const tensors = new Map(small);
  for (const [name, tensor] of Object.entries(changes)) {
    if (tensor) tensors.set(name, tensor);
    else tensors.delete(name);
  }
  return tensors;
}

export const sendForward = (client: Client, tensors: Tensors, fields: Fields = {}): Promise<Message> =>
  client.send('forward', { model: MODEL, ...fields }, tensors);

/** The tensor `out` of a forward that must succeed. */
export async function outOf(client: Client, tensors: Tensors, fields: Fields = {}): Promise<Tensor> {
  const answer = await sendForward(client, tensors, fields);
  expect(answer.error).toBeUndefined();
  return answer.tensors!.get('out')!;
}

export async function expectRefusal(
  client: Client,
  tensors: Tensors,
  fields: Fields,
  code: string,
): Promise<void> {
  const { ok, error } = await sendForward(client, tensors, fields);
  const note = JSON.stringify([
    fields,
    ...[...tensors].map(([name, { dtype, shape }]) => [name, dtype, shape]),
  ]);
  expect(ok, note.slice(0, 300)).toBe(false);
  expect(error, note.slice(0, 300)).toEqual({
    code,
    message: expect.stringMatching(/.{10}/),
    details: expect.any(Object),
  });
}
