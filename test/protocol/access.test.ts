/**
 * Who may connect, what they are greeted with, the plain HTTP paths, and the ending, on a server with a token.
 * It is not about requests: those are in the files beside it.
 */
import { request } from 'node:http';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Client, type OpenOptions, Refused } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { readTensors, type Tensors } from './tensors.ts';

const TOKEN = 'correct-horse/battery+staple==';
const AUTHORIZED = { Authorization: `Bearer ${TOKEN}` };
let server: Server;

beforeAll(async () => {
  server = await serve(
    '--token',
    TOKEN,
    '--allow-host',
    'gpu.example',
    '--allow-origin',
    'https://ui.example',
  );
});
afterAll(() => server.stop());

async function refusal(options: OpenOptions): Promise<Refused> {
  const outcome: unknown = await server.open(options).catch((error: unknown) => error);
  if (outcome instanceof Client) await outcome.close();
  expect(outcome).toBeInstanceOf(Refused);
  return outcome as Refused;
}

async function accepted(headers: Readonly<Record<string, string>>): Promise<void> {
  const client = await server.open({ headers: { ...AUTHORIZED, ...headers } });
  expect(await client.finish()).toEqual([]);
}

/** With the Host header free to choose, which fetch forbids. */
function get(
  path: string,
  headers: Readonly<Record<string, string>> = {},
): Promise<{ status: number; type: string; body: string }> {
  return new Promise((resolve, reject) => {
    const call = request(server.http + path, { headers, agent: false }, (response) => {
      let body = '';
      response.setEncoding('utf8');
      response.on('data', (text: string) => {
        body += text;
      });
      response.on('end', () =>
        resolve({ status: response.statusCode ?? 0, type: response.headers['content-type'] ?? '', body }),
      );
    });
    call.on('error', reject);
    call.end();
  });
}

test('a client that does not offer the subprotocol is refused with 400 and a sentence', async () => {
  for (const protocols of [[], ['unetd.v2'], ['graphql-ws', 'UNETD.V1']]) {
    const { status, body } = await refusal({ protocols, headers: AUTHORIZED });
    expect(status).toBe(400);
    expect(body).toMatch(/unetd\.v1.*\.\s*$/s);
  }
});

test('the subprotocol is found among others and no extension is agreed to', async () => {
  const client = await server.open({ protocols: ['other', 'unetd.v1'], headers: AUTHORIZED });
  expect(client.socket.protocol).toBe('unetd.v1');
  expect(client.socket.extensions).toBe('');
  expect(await client.finish()).toEqual([]);
});

test('a missing, wrong, cut or wrongly presented token is answered 401', async () => {
  const basic = Buffer.from(`x:${TOKEN}`).toString('base64');
  for (const value of [
    undefined,
    'Bearer wrong',
    `Bearer ${TOKEN.slice(0, -1)}`,
    'Bearer ',
    TOKEN,
    `Basic ${basic}`,
  ]) {
    const { status } = await refusal({ headers: value === undefined ? {} : { Authorization: value } });
    expect(status, String(value)).toBe(401);
  }
});

test('a Host or Origin that is not on the list is answered 403', async () => {
  for (const headers of [
    { Host: 'evil.example' },
    { Host: 'evil.example:80' },
    { Host: 'localhost.evil.example' },
    { Host: '127.0.0.1.evil.example' },
    { Origin: 'https://evil.example' },
    { Origin: 'http://ui.example' },
    { Origin: 'null' },
  ]) {
    const { status, body } = await refusal({ headers: { ...AUTHORIZED, ...headers } });
    expect(status, JSON.stringify(headers)).toBe(403);
    expect(body).not.toBe('');
  }
});

test('an IP address, localhost, the allowed names and the own and allowed origins are let in', async () => {
  const port = new URL(server.url).port;
  await accepted({ Host: `localhost:${port}` });
  await accepted({ Host: `192.0.2.7:${port}` });
  await accepted({ Host: `[::1]:${port}` });
  await accepted({ Host: 'gpu.example' });
  await accepted({ Origin: server.http });
  await accepted({ Origin: 'https://ui.example' });
});

test('an upgrade on another path is answered 404', async () => {
  for (const path of ['/', '/v2', '/v1/x']) {
    expect((await refusal({ path, headers: AUTHORIZED })).status, path).toBe(404);
  }
});

test('the hello comes first and has every field', async () => {
  const client = await server.open({ headers: AUTHORIZED });
  expect(client.messages).toHaveLength(1);
  expect(client.hello).toEqual({
    event: 'hello',
    protocol: 1,
    server: expect.stringMatching(/^unetd\/\d+\.\d+\.\d+/),
    device: { name: expect.any(String), backend: expect.any(String), features: expect.any(Array) },
    limits: { maxMessageBytes: expect.any(Number), maxInFlight: expect.any(Number) },
  });
  expect(await client.finish()).toEqual([]);
});

test('health, readiness and the monitor page need no token', async () => {
  expect((await get('/healthz')).status).toBe(200);
  expect((await get('/readyz')).status).toBe(200);
  const page = await get('/');
  expect(page.status).toBe(200);
  expect(page.type).toContain('text/html');
  expect(page.body).toContain('<html');
});

test('metrics, models and stats need the token', async () => {
  for (const path of ['/metrics', '/v1/models', '/v1/stats']) {
    expect((await get(path)).status, path).toBe(401);
    expect((await get(path, { Authorization: 'Bearer wrong' })).status, path).toBe(401);
    expect((await get(path, AUTHORIZED)).status, path).toBe(200);
  }
  expect((await get('/nothing', AUTHORIZED)).status).toBe(404);
  expect((await get('/v1/models', { ...AUTHORIZED, Host: 'evil.example' })).status).toBe(403);
});

test('the metrics are Prometheus text', async () => {
  const { type, body } = await get('/metrics', AUTHORIZED);
  expect(type).toContain('text/plain');
  expect(body.endsWith('\n')).toBe(true);
  const names = new Set<string>();
  for (const line of body.trimEnd().split('\n')) {
    const help = /^# (?:HELP|TYPE) (\w+) .+$/.exec(line);
    const sample =
      /^([a-zA-Z_:][\w:]*)(?:\{\w+="[^"]*"(?:,\w+="[^"]*")*\})? (?:-?[\d.]+(?:e[+-]?\d+)?|NaN|[+-]Inf)$/.exec(
        line,
      );
    expect(line === '' || help || sample, line).toBeTruthy();
    if (sample) names.add(sample[1]!);
  }
  expect(names.size).toBeGreaterThan(3);
});

test('models and stats over HTTP are those of the operations', async () => {
  const client = await server.open({ headers: AUTHORIZED });
  const models = await get('/v1/models', AUTHORIZED);
  expect(models.type).toContain('application/json');
  expect(JSON.parse(models.body)).toEqual((await client.ask('models.list')).result);
  const stats = JSON.parse((await get('/v1/stats', AUTHORIZED)).body) as Record<string, unknown>;
  expect(Object.keys(stats).sort()).toEqual(Object.keys((await client.ask('stats')).result).sort());
  expect(await client.finish()).toEqual([]);
});

test('a server without a token does not listen off loopback', async () => {
  await expect(serve('--host', '0.0.0.0')).rejects.toThrow(/the server ended with [1-9].*token/s);
});

test('on SIGTERM open requests finish, new ones and new connections are refused, and the close code is 1001', async () => {
  const reference = readTensors(`${ASSETS}reference.safetensors`).tensors;
  const inputs: Tensors = new Map(['x', 'timesteps', 'context'].map((name) => [name, reference.get(name)!]));
  const client = await server.open({ headers: AUTHORIZED });
  await client.ask('model.load', { model: MODEL });
  const open = Array.from({ length: 4 }, () => client.send('forward', { model: MODEL }, inputs));
  await client.ask('stats');
  server.terminate();
  let late = await client.ask('models.list');
  while (late.ok) late = await client.ask('models.list');
  expect(late.error?.code).toBe('ERR_SHUTTING_DOWN');
  expect((await get('/readyz')).status).toBe(503);
  expect((await get('/healthz')).status).toBe(200);
  expect((await refusal({ headers: AUTHORIZED })).status).toBe(503);
  for (const answer of await Promise.all(open)) expect(answer.ok).toBe(true);
  expect(await client.closed).toBe(1001);
  expect(await server.stop()).toBe(0);
});
