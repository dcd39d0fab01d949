/** Three servers behind HAProxy with the shipped configuration: how it spreads, and what is lost when servers go. Nothing. */
import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import WebSocket from 'ws';
import { Client, floatsOf } from '../../src/client.ts';
import { FailoverClient } from '../../src/failover.ts';
import { ROOT } from '../launch.ts';
import { comfyPlace, modelFile, type Place, request } from '../server/setting.ts';
import { standInResult } from '../server/stand-in-engine.ts';
import {
  type Balancer,
  type ServerProcess,
  SHIPPED,
  STAND_IN,
  startBalancer,
  startServer,
  until,
} from './fleet.ts';

const SLOW = 'slow.safetensors';
const LORAS = [
  [],
  [{ lora: 'double.safetensors', strength: 0.5 }],
  [
    { lora: 'double.safetensors', strength: -1 },
    { lora: 'styles/minus.safetensors', strength: 2 },
  ],
];
const FACTORS = new Map([
  ['double.safetensors', 1],
  ['styles/minus.safetensors', -0.5],
]);

let place: Place;
let servers: ServerProcess[];
let balancer: Balancer;
const open: { close(): Promise<void> }[] = [];

const serverArgs = (): readonly string[] => ['--models', place.dir, '--log-level', 'error', ...STAND_IN];

beforeAll(async () => {
  place = comfyPlace(20);
  servers = await Promise.all([0, 0, 0].map((port) => startServer(port, serverArgs())));
  balancer = await startBalancer(servers.map(({ port }) => port));
});

/** Brings back what the test before has ended. */
beforeEach(async () => {
  servers = await Promise.all(
    servers.map((server) => (server.hasEnded() ? startServer(server.port, serverArgs()) : server)),
  );
  await until(async () => [...(await balancer.states()).values()].every((state) => state === 'UP'));
});

afterEach(async () => {
  await Promise.allSettled(open.splice(0).map((client) => client.close()));
  // HAProxy passes it on with a delay, and the next test counts connections.
  await until(async () => {
    const alive = servers.filter((server) => !server.hasEnded());
    const all = await Promise.all(alive.map((server) => server.stats()));
    return all.every(({ connections }) => connections === 0);
  });
});

afterAll(async () => {
  await balancer?.stop();
  for (const server of servers ?? []) server.kill('SIGKILL');
  await Promise.all((servers ?? []).map(({ exit }) => exit));
  place.remove();
});

async function connect(): Promise<Client> {
  const client = await Client.connect(balancer.url);
  open.push(client);
  return client;
}

function failoverClients(count: number, urls: readonly string[]): FailoverClient[] {
  const clients = Array.from({ length: count }, () => new FailoverClient(urls));
  open.push(...clients);
  return clients;
}

const connections = async (): Promise<number[]> =>
  Promise.all(servers.map(async (server) => (await server.stats()).connections));

interface Tally {
  done: number;
}

/** Sends so many forwards, several at a time, each one different, and compares every result with what it must be. */
async function work(client: FailoverClient, seed: number, count: number, tally: Tally): Promise<void> {
  let next = 0;
  const lane = async (): Promise<void> => {
    while (next < count) {
      const n = seed * 1000 + next;
      next += 1;
      const sent = { ...request(SLOW, 1 + (n % 2), n), loras: LORAS[n % LORAS.length]! };
      const { out } = await client.forward(sent);
      expect(floatsOf(out)).toEqual(floatsOf(standInResult(sent, FACTORS)));
      tally.done += 1;
    }
  };
  await Promise.all([lane(), lane(), lane(), lane()]);
}

describe('the shipped configuration', () => {
  it('is valid as it is', () => {
    expect(() => execFileSync('haproxy', ['-c', '-q', '-f', SHIPPED])).not.toThrow();
  });

  it('speaks TLS with the line of the threat model', async () => {
    const text = readFileSync(`${ROOT}docs/THREATS.md`, 'utf8');
    const bind = /^ *(bind :443 ssl .*)$/m.exec(text)![1]!;
    const [key, certificate] = [join(place.dir, 'key.pem'), join(place.dir, 'certificate.pem')];
    const options = ['-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '1'];
    const names = ['-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'];
    execFileSync('openssl', ['req', ...options, ...names, '-keyout', key, '-out', certificate], {
      stdio: 'ignore',
    });
    const ca = readFileSync(certificate);
    writeFileSync(certificate, Buffer.concat([ca, readFileSync(key)]));
    const secure = await startBalancer([servers[0]!.port], { bind, certificate });
    const socket = new WebSocket(secure.url, 'unetd.v1', { ca });
    const [hello] = await once(socket, 'message');
    expect(JSON.parse(String(hello))).toMatchObject({ event: 'hello', protocol: 1 });
    socket.terminate();
    await secure.stop();
  });

  it('spreads connections evenly', async () => {
    for (let i = 0; i < 12; i += 1) await connect();
    expect(await connections()).toEqual([4, 4, 4]);
  });

  it('sends new connections elsewhere while a server drains by command, and lets old ones be', async () => {
    const clients = [];
    for (let i = 0; i < 6; i += 1) clients.push(await connect());
    await balancer.command('set server unetd/s1 state drain');
    for (let i = 0; i < 6; i += 1) await connect();
    expect(await connections()).toEqual([2, 5, 5]);
    for (const client of clients) await client.forward(request(SLOW));
    await balancer.command('set server unetd/s1 state ready');
    for (let i = 0; i < 3; i += 1) await connect();
    expect(await connections()).toEqual([5, 5, 5]);
  });
});

describe('under load', () => {
  it('loses nothing when one server is killed and another one drains, and takes one back', async () => {
    const tally = { done: 0 };
    const clients = failoverClients(12, [balancer.url]);
    const each = 150;
    const started = performance.now();
    const all = Promise.all(clients.map((client, seed) => work(client, seed, each, tally)));
    await until(async () => tally.done > 200);
    servers[0]!.kill('SIGKILL');
    await until(async () => tally.done > 700);
    servers[1]!.kill('SIGTERM');
    expect(await servers[1]!.exit).toBe(0);
    await until(async () => (await balancer.states()).get('s2') !== 'UP');
    servers[0] = await startServer(servers[0]!.port, serverArgs());
    await until(async () => (await balancer.states()).get('s1') === 'UP');
    await all;
    expect(tally.done).toBe(12 * each);
    const resent = clients.reduce((sum, client) => sum + client.resent, 0);
    // At least the open requests of four connections, and those few that the draining server refused.
    expect(resent).toBeGreaterThan(0);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    console.log(
      `12 clients, ${tally.done} forwards in ${seconds} s, one server killed, one drained: ${tally.done} right, ${resent} sent again`,
    );
    expect((await servers[0].stats()).connections + (await servers[2]!.stats()).connections).toBe(12);
  });

  it('shows a client nothing of a server that is gone or ending when it connects', async () => {
    place.write('checkpoints/slower.safetensors', modelFile({ delayMs: '2000' }));
    const direct = await Client.connect(servers[1]!.url);
    open.push(direct);
    const last = direct.forward(request('slower.safetensors'));
    await until(async () => (await servers[1]!.stats()).queue.running === 1);
    servers[0]!.kill('SIGKILL');
    await servers[0]!.exit;
    servers[1]!.kill('SIGTERM');
    await until(async () => !(await servers[1]!.stats()).ready);
    // HAProxy, which looks once a second, has noticed neither.
    const before = [...(await balancer.states()).values()];
    const clients = await Promise.all(Array.from({ length: 9 }, connect));
    expect(before).toEqual(['UP', 'UP', 'UP']);
    expect((await last).timing.batch).toBe(1);
    for (const client of clients) await client.forward(request(SLOW));
    expect((await servers[2]!.stats()).connections).toBe(9);
  });
});

describe('clients with several addresses', () => {
  it('finish their work without a balancer when servers are killed and drained', async () => {
    const tally = { done: 0 };
    const urls = servers.map(({ url }) => url);
    const clients = Array.from(
      { length: 6 },
      (_, i) => new FailoverClient([...urls.slice(i % 3), ...urls.slice(0, i % 3)]),
    );
    open.push(...clients);
    const all = Promise.all(clients.map((client, seed) => work(client, seed, 100, tally)));
    await until(async () => tally.done > 100);
    servers[0]!.kill('SIGKILL');
    await until(async () => tally.done > 300);
    servers[1]!.kill('SIGTERM');
    await all;
    expect(tally.done).toBe(600);
    expect((await servers[2]!.stats()).connections).toBe(6);
  });

  it('give up with the reason when there is no server at all', async () => {
    const client = new FailoverClient(['ws://127.0.0.1:1/v1', 'ws://127.0.0.1:2/v1'], { patienceMs: 300 });
    await expect(client.forward(request(SLOW))).rejects.toMatchObject({
      code: 'ERR_DISCONNECTED',
      message: expect.stringContaining('Cannot connect to ws://127.0.0.1:2/v1'),
    });
  });

  it('do not send again what is the fault of the request', async () => {
    const [client] = failoverClients(1, [balancer.url]);
    await expect(client!.forward(request('none.safetensors'))).rejects.toMatchObject({
      code: 'ERR_UNKNOWN_MODEL',
    });
    await expect(client!.forward({ ...request(SLOW), reuse: { context: 'key' } })).rejects.toMatchObject({
      code: 'ERR_BAD_REQUEST',
    });
    expect(client!.resent).toBe(0);
  });
});
