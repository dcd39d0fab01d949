/** One forward of the demo's model at a server, compared with the reference that PyTorch gave. No test itself. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'vitest';
import { Client, type ClientTensor, floatsOf } from '../../src/client.ts';
import { decode } from '../../src/safetensors.ts';
import { ROOT } from '../launch.ts';

export const MODEL = 'emoji-unet.safetensors';
/** The server's own choice may be f16; a wrong result is off by its whole size. */
const NEAR = 2e-2;

export async function forwardOnce(url: string, token?: string): Promise<void> {
  const { tensors } = decode(readFileSync(join(ROOT, 'demo/assets/reference.safetensors')));
  const of = (name: string): ClientTensor => tensors.get(name) as unknown as ClientTensor;
  const client = await Client.connect(url, token === undefined ? {} : { token });
  const { out } = await client.forward({
    model: MODEL,
    x: of('x'),
    timesteps: of('timesteps'),
    context: of('context'),
  });
  await client.close();
  const expected = floatsOf(of('out'));
  const found = floatsOf(out);
  expect(found).toHaveLength(expected.length);
  const norm = (values: Float32Array): number =>
    Math.sqrt(values.reduce((sum, each) => sum + each * each, 0));
  expect(norm(found.map((each, i) => each - expected[i]!)) / norm(expected)).toBeLessThan(NEAR);
}
