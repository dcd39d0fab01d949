/**
 * What balancing per connection gives and what it cannot: the figures of docs/SCALING.md. The servers take one image at a
 * time, 50 ms each, so one of them does 20 images a second whatever the machine.
 */
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { Client } from '../../src/client.ts';
import { comfyPlace, type Place, request } from '../server/setting.ts';
import { type Balancer, type ServerProcess, STAND_IN, startBalancer, startServer, until } from './fleet.ts';

const SLOW = 'slow.safetensors';
const SECONDS = 3;
/** Images a second of one server. */
const ONE = 20;

let place: Place;
let servers: ServerProcess[];
let balancer: Balancer;
const clients: Client[] = [];

const serverArgs = (): readonly string[] => [
  ...['--models', place.dir, '--max-batch', '1', '--log-level', 'error'],
  ...STAND_IN,
];

beforeAll(async () => {
  place = comfyPlace(50);
  servers = await Promise.all([0, 0, 0].map((port) => startServer(port, serverArgs())));
});

afterEach(async () => {
  await Promise.allSettled(clients.splice(0).map((client) => client.close()));
  await balancer?.stop();
});

afterAll(async () => {
  for (const server of servers ?? []) server.kill('SIGKILL');
  await Promise.all((servers ?? []).map(({ exit }) => exit));
  place.remove();
});

async function connect(count: number): Promise<readonly Client[]> {
  const made: Client[] = [];
  for (let i = 0; i < count; i += 1) made.push(await Client.connect(balancer.url));
  clients.push(...made);
  for (const client of made) await client.modelLoad(SLOW);
  return made;
}

/** Images a second that these clients get together, each with so many requests open at any time. */
async function rate(active: readonly Client[], window: number): Promise<number> {
  let done = 0;
  let over = false;
  const lanes = active.flatMap((client) =>
    Array.from({ length: window }, async () => {
      while (!over) {
        await client.forward(request(SLOW));
        if (!over) done += 1;
      }
    }),
  );
  await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
  over = true;
  const images = done / SECONDS;
  await Promise.all(lanes);
  return images;
}

const report = (what: string, images: number): void => {
  console.log(`${what}: ${images.toFixed(1)} images/s, ${(images / ONE).toFixed(2)} servers' worth`);
};
const shares = async (): Promise<number[]> =>
  Promise.all(servers.map(async (server) => (await server.stats()).connections));

describe('balancing per connection', () => {
  it('triples the throughput of many equal clients', async () => {
    balancer = await startBalancer([servers[0]!.port]);
    const alone = await rate(await connect(12), 1);
    await balancer.stop();
    balancer = await startBalancer(servers.map(({ port }) => port));
    const together = await rate(await connect(12), 1);
    report('12 equal clients, 1 server', alone);
    report('12 equal clients, 3 servers', together);
    expect(alone).toBeGreaterThan(0.6 * ONE);
    expect(alone).toBeLessThan(1.05 * ONE);
    expect(together / alone).toBeGreaterThan(2.2);
  });

  it('gives one client one server, however much it asks for', async () => {
    balancer = await startBalancer(servers.map(({ port }) => port));
    const [client] = await connect(1);
    const images = await rate([client!], 16);
    report('1 client with 16 open requests, 3 servers', images);
    expect(images).toBeLessThan(1.05 * ONE);
  });

  it('can put the busy ones of many connections on one server', async () => {
    balancer = await startBalancer(servers.map(({ port }) => port));
    const all = await connect(9);
    const busy = all.filter((_, i) => i % 3 === 0);
    const images = await rate(busy, 4);
    report('3 busy and 6 idle clients, 3 servers, unlucky order', images);
    expect(images).toBeLessThan(1.05 * ONE);
    const lucky = await rate(all.slice(0, 3), 4);
    report('3 busy and 6 idle clients, 3 servers, lucky order', lucky);
    expect(lucky).toBeGreaterThan(2.2 * ONE);
  });

  it('does not move connections to a server that comes back', async () => {
    balancer = await startBalancer(servers.map(({ port }) => port));
    await connect(8);
    servers[2]!.kill('SIGTERM');
    await servers[2]!.exit;
    const moved = await connect(4);
    servers[2] = await startServer(servers[2]!.port, serverArgs());
    await until(async () => (await balancer.states()).get('s3') === 'UP');
    const staying = clients.filter((_, i) => i % 3 !== 2 || i > 7);
    expect(moved).toHaveLength(4);
    expect((await shares())[2]).toBe(0);
    const images = await rate(staying.slice(0, 10), 1);
    report('10 clients, 3 servers, one of them back after all clients had moved', images);
    expect(images).toBeLessThan(2.1 * ONE);
    const fresh = await connect(4);
    expect((await shares())[2]).toBe(4);
    const balanced = await rate([...staying.slice(0, 10), ...fresh], 1);
    report('the same and 4 new connections', balanced);
    expect(balanced).toBeGreaterThan(2.2 * ONE);
  });
});
