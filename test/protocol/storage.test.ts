/** Two connections and one model in a dtype of the first one's choice, with the real engine: the numbers of one do not depend on the other. */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { readTensors, type Tensors } from './tensors.ts';

const reference = readTensors(`${ASSETS}reference.safetensors`).tensors;
const inputs: Tensors = new Map(['x', 'timesteps', 'context'].map((name) => [name, reference.get(name)!]));
let server: Server;

beforeAll(async () => {
  server = await serve('--dtype', 'f16');
});
afterAll(() => server?.stop());

test('the results of a connection that chose a dtype stay the same, whatever another one asks for', async () => {
  const [first, second] = [await server.open(), await server.open()];
  const out = async (client: typeof first): Promise<Uint8Array> => {
    const { tensors, error } = await client.send('forward', { model: MODEL }, inputs);
    expect(error).toBeUndefined();
    return tensors!.get('out')!.data;
  };
  expect((await first.ask('model.load', { model: MODEL, dtype: 'f32' })).result.dtype).toBe('f32');
  const expected = await out(first);
  expect((await second.ask('model.load', { model: MODEL, dtype: 'f16' })).error).toMatchObject({
    code: 'ERR_MODEL_BUSY',
    details: { model: MODEL, dtype: 'f16', held: 'f32', connections: 1 },
  });
  expect(Buffer.compare(await out(first), expected)).toBe(0);
  // Unloaded by another one it comes back as it was, although the server's own choice is f16.
  expect((await second.ask('model.unload', { model: MODEL })).ok).toBe(true);
  expect(Buffer.compare(await out(second), expected)).toBe(0);
  expect(await first.finish()).toEqual([]);
  const { result } = await second.ask('model.load', { model: MODEL, dtype: 'f16' });
  expect(result.dtype).toBe('f16');
  expect(Buffer.compare(await out(second), expected)).not.toBe(0);
  expect(await second.finish()).toEqual([]);
});
