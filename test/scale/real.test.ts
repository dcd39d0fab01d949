/** Rung `software`: three servers with the real engine and the demo's model behind HAProxy, one killed and one drained under load. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Client, type ForwardRequest, floatsOf, tensorFrom } from '../../src/client.ts';
import { FailoverClient } from '../../src/failover.ts';
import { type Balancer, type ServerProcess, startBalancer, startServer, until } from './fleet.ts';

const ARGS = [
  ...['--models', 'demo/assets/models', '--loras', 'demo/assets/loras'],
  ...['--dtype', 'f32', '--max-batch', '4', '--log-level', 'error'],
];
const MODEL = 'emoji-unet.safetensors';
const CLIENTS = 6;
const EACH = 10;
/** Rounding depends on the batch; a LoRA of another request is far more. */
const SAME = 1e-4;

let servers: ServerProcess[];
let balancer: Balancer;

beforeAll(async () => {
  servers = await Promise.all([0, 0, 0].map((port) => startServer(port, ARGS)));
  balancer = await startBalancer(servers.map(({ port }) => port));
});

afterAll(async () => {
  await balancer?.stop();
  for (const server of servers ?? []) server.kill('SIGKILL');
  await Promise.all((servers ?? []).map(({ exit }) => exit));
});

const noise = (count: number, seed: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => Math.sin((i + seed * 1000) * 12.9898) * 1.5);

const STACKS = [
  [],
  [{ lora: 'ink.safetensors', strength: 1 }],
  [
    { lora: 'neon.safetensors', strength: 0.8 },
    { lora: 'terracotta.safetensors', strength: -0.5 },
  ],
];

const requestOf = (seed: number): ForwardRequest => ({
  model: MODEL,
  loras: STACKS[seed % STACKS.length]!,
  x: tensorFrom(noise(768, seed), [1, 3, 16, 16]),
  timesteps: tensorFrom(Float32Array.of((seed * 37) % 1000), [1]),
  context: tensorFrom(noise(256, seed + 500), [1, 4, 64]),
});

function difference(found: Float32Array, expected: Float32Array): number {
  const norm = (values: Float32Array): number =>
    Math.sqrt(values.reduce((sum, each) => sum + each * each, 0));
  return norm(found.map((each, i) => each - expected[i]!)) / norm(expected);
}

describe('three servers with the real engine (software)', () => {
  it('answer every forward rightly although one is killed and one drains', async () => {
    const lone = await Client.connect(servers[2]!.url);
    const expected: Float32Array[] = [];
    for (let seed = 0; seed < CLIENTS * EACH; seed += 1)
      expected.push(floatsOf((await lone.forward(requestOf(seed))).out));
    await lone.close();
    const clients = Array.from({ length: CLIENTS }, () => new FailoverClient([balancer.url]));
    let done = 0;
    let worst = 0;
    const all = Promise.all(
      clients.map(async (client, c) => {
        for (let i = 0; i < EACH; i += 2)
          await Promise.all(
            [i, i + 1].map(async (n) => {
              const seed = c * EACH + n;
              const { out } = await client.forward(requestOf(seed));
              worst = Math.max(worst, difference(floatsOf(out), expected[seed]!));
              done += 1;
            }),
          );
      }),
    );
    await until(async () => done >= 12, 60_000);
    servers[0]!.kill('SIGKILL');
    await until(async () => done >= 24, 60_000);
    servers[1]!.kill('SIGTERM');
    await all;
    expect(await servers[1]!.exit).toBe(0);
    expect(done).toBe(CLIENTS * EACH);
    const resent = clients.reduce((sum, client) => sum + client.resent, 0);
    console.log(`${done} forwards right within ${worst.toExponential(1)}, ${resent} sent again`);
    expect(worst).toBeLessThan(SAME);
    expect(resent).toBeGreaterThan(0);
    await Promise.all(clients.map((client) => client.close()));
  });
});
