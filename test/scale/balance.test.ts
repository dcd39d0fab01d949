/**
 * What balancing per connection gives and what it cannot: the figures of docs/SCALING.md. The servers take one image at a
 * time, 50 ms each, so one of them does 20 images a second at most. How near a busy machine comes to that is printed; the
 * tests look at which server did the work.
 */
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { Client } from '../../src/client.ts';
import { comfyPlace, type Place, request } from '../server/setting.ts';
import { type Balancer, type ServerProcess, STAND_IN, startBalancer, startServer, until } from './fleet.ts';

const SLOW = 'slow.safetensors';
const SECONDS = 3;
/** Images a second of one server. */
const ONE = 20;
/** The least share of a server that has as many equal clients as the two others. */
const EVEN = 0.25;

interface Work {
  readonly rate: number;
  readonly shares: readonly number[];
}

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

/**
 * Lets these clients work, each with so many requests open at any time. Prints and gives the images a second of all, and the
 * share of each server in them.
 */
async function work(what: string, active: readonly Client[], window: number): Promise<Work> {
  const before = await completed();
  let over = false;
  const lanes = active.flatMap((client) =>
    Array.from({ length: window }, async () => {
      while (!over) await client.forward(request(SLOW));
    }),
  );
  const start = performance.now();
  await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
  over = true;
  await Promise.all(lanes);
  const seconds = (performance.now() - start) / 1000;
  const images = (await completed()).map((count, i) => count - before[i]!);
  const all = images.reduce((sum, count) => sum + count, 0);
  console.log(
    `${what}: ${(all / seconds).toFixed(1)} images/s, ${(all / seconds / ONE).toFixed(2)} servers' worth`,
  );
  return { rate: all / seconds, shares: images.map((count) => count / all) };
}

const completed = async (): Promise<number[]> =>
  Promise.all(servers.map(async (server) => (await server.stats()).forwards.completed));
const sorted = (shares: readonly number[]): number[] => [...shares].sort((a, b) => a - b);
const connections = async (): Promise<number[]> =>
  Promise.all(servers.map(async (server) => (await server.stats()).connections));

describe('balancing per connection', () => {
  it('gives every server its share of the work of many equal clients', async () => {
    balancer = await startBalancer([servers[0]!.port]);
    const alone = await work('12 equal clients, 1 server', await connect(12), 1);
    expect(alone.rate).toBeLessThan(1.05 * ONE);
    await balancer.stop();
    balancer = await startBalancer(servers.map(({ port }) => port));
    const { shares } = await work('12 equal clients, 3 servers', await connect(12), 1);
    expect(Math.min(...shares)).toBeGreaterThan(EVEN);
  });

  it('gives one client one server, however much it asks for', async () => {
    balancer = await startBalancer(servers.map(({ port }) => port));
    const { rate, shares } = await work('1 client with 16 open requests, 3 servers', await connect(1), 16);
    expect(rate).toBeLessThan(1.05 * ONE);
    expect(sorted(shares)).toEqual([0, 0, 1]);
  });

  it('can put the busy ones of many connections on one server', async () => {
    balancer = await startBalancer(servers.map(({ port }) => port));
    const all = await connect(9);
    const busy = all.filter((_, i) => i % 3 === 0);
    const unlucky = await work('3 busy and 6 idle clients, 3 servers, unlucky order', busy, 4);
    expect(sorted(unlucky.shares)).toEqual([0, 0, 1]);
    const lucky = await work('3 busy and 6 idle clients, 3 servers, lucky order', all.slice(0, 3), 4);
    expect(Math.min(...lucky.shares)).toBeGreaterThan(EVEN);
  });

  it('does not move connections to a server that comes back', async () => {
    balancer = await startBalancer(servers.map(({ port }) => port));
    await connect(8);
    servers[2]!.kill('SIGTERM');
    await servers[2]!.exit;
    const moved = await connect(4);
    servers[2] = await startServer(servers[2]!.port, serverArgs());
    await until(async () => (await balancer.states()).get('s3') === 'UP');
    const staying = clients.filter((_, i) => i % 3 !== 2 || i > 7).slice(0, 10);
    expect(moved).toHaveLength(4);
    expect((await connections())[2]).toBe(0);
    const back = '10 clients, 3 servers, one of them back after all clients had moved';
    expect((await work(back, staying, 1)).shares[2]).toBe(0);
    const fresh = await connect(4);
    expect((await connections())[2]).toBe(4);
    const { shares } = await work('the same and 4 new connections', [...staying, ...fresh], 1);
    expect(Math.min(...shares)).toBeGreaterThan(EVEN);
  });
});
