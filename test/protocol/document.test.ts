/**
 * The examples of docs/PROTOCOL.md read and written by this folder's own reader and writer.
 * It is not about the server; that the server reads such frames is shown by the files beside it.
 */
import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { decode, encode, f16, f32, type Tensors, valuesOf } from './tensors.ts';

const text = readFileSync(new URL('../../docs/PROTOCOL.md', import.meta.url), 'utf8');
const dumps = [...text.matchAll(/```text\n(.*?)```/gs)].map(([, dump]) => {
  const lines = dump!.trimEnd().split('\n');
  const bytes = lines.map((line) => Buffer.from(line.slice(6, 53).replaceAll(' ', ''), 'hex'));
  for (const [i, line] of lines.entries()) expect(Number.parseInt(line.slice(0, 4), 16)).toBe(16 * i);
  return Buffer.concat(bytes);
});

test('the example of a forward is what the writer makes of its message and tensors', () => {
  const { metadata, tensors } = decode(dumps[0]!);
  expect(JSON.parse(metadata.req!)).toEqual({ id: '7', op: 'forward', model: 'toy.safetensors' });
  expect(
    [...tensors].map(([name, tensor]) => [name, tensor.dtype, tensor.shape, [...valuesOf(tensor)]]),
  ).toEqual([
    ['context', 'F32', [1, 1, 2], [0.25, -0.5]],
    ['timesteps', 'F32', [1], [999]],
    ['x', 'F16', [1, 4, 1, 1], [1, -1, 0.5, 2]],
  ]);
  const written: Tensors = new Map([
    ['context', f32([1, 1, 2], [0.25, -0.5])],
    ['timesteps', f32([1], [999])],
    ['x', f16([1, 4, 1, 1], [1, -1, 0.5, 2])],
  ]);
  expect(encode({ req: '{"id":"7","op":"forward","model":"toy.safetensors"}' }, written)).toEqual(dumps[0]);
});

test('the example of an answer holds what the text says', () => {
  const { metadata, tensors } = decode(dumps[1]!);
  expect(JSON.parse(metadata.res!)).toEqual({
    id: '7',
    ok: true,
    timing: { queueMs: 0.2, gpuMs: 1.5, batch: 1, batchedRequests: 1 },
  });
  const out = tensors.get('out')!;
  expect([out.dtype, out.shape, [...valuesOf(out)]]).toEqual(['F16', [1, 4, 1, 1], [1, 0, 0, -2]]);
  expect(encode(metadata, tensors)).toEqual(dumps[1]);
});
