/** Who is let in, what plain HTTP gives, and how the server ends. */
import { createConnection } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import WebSocket from 'ws';
import { Client } from '../../src/client.ts';
import { refusePlace, refuseToken } from '../../src/server/guard.ts';
import { serve } from '../../src/server/serve.ts';
import { comfyPlace, openStage, type Place, request, SILENT, type Stage } from './setting.ts';
import { StandInEngine } from './stand-in-engine.ts';

let place: Place;
let stage: Stage | undefined;

beforeEach(() => {
  place = comfyPlace(150);
});

afterEach(async () => {
  await stage?.end();
  stage = undefined;
  place.remove();
});

/** The status and body with which an upgrade is refused, or 101. */
function upgrade(
  url: string,
  protocols: string[],
  headers: Record<string, string> = {},
): Promise<[number, string]> {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(url, protocols, { headers });
    socket.on('error', () => {});
    socket.on('open', () => {
      socket.terminate();
      resolve([101, socket.protocol]);
    });
    socket.on('unexpected-response', (_request, response) => {
      let body = '';
      response.on('data', (chunk) => {
        body += chunk;
      });
      response.on('end', () => resolve([response.statusCode ?? 0, body]));
    });
    setTimeout(() => reject(new Error('no answer')), 5000).unref();
  });
}

describe('an upgrade', () => {
  it('needs the subprotocol, the path and a fitting host', async () => {
    stage = await openStage(place);
    const { url } = stage.server;
    expect(await upgrade(url, ['unetd.v1'])).toEqual([101, 'unetd.v1']);
    expect(await upgrade(url, ['chat', 'unetd.v1'])).toEqual([101, 'unetd.v1']);
    const [none, sentence] = await upgrade(url, []);
    expect(none).toBe(400);
    expect(sentence).toContain('subprotocol unetd.v1');
    expect((await upgrade(url, ['chat']))[0]).toBe(400);
    expect((await upgrade(`${url}x`, ['unetd.v1']))[0]).toBe(404);
    expect((await upgrade(url, ['unetd.v1'], { host: 'evil.example' }))[0]).toBe(403);
    expect((await upgrade(url, ['unetd.v1'], { origin: 'https://evil.example' }))[0]).toBe(403);
    expect((await upgrade(url, ['unetd.v1'], { origin: stage.origin }))[0]).toBe(101);
  });

  it('needs the token where the server has one', async () => {
    stage = await openStage(place, { token: 'secret' });
    const { url } = stage.server;
    expect((await upgrade(url, ['unetd.v1']))[0]).toBe(401);
    expect((await upgrade(url, ['unetd.v1'], { authorization: 'Bearer secreT' }))[0]).toBe(401);
    expect((await upgrade(url, ['unetd.v1'], { authorization: 'bearer secret' }))[0]).toBe(101);
    await expect(Client.connect(url)).rejects.toMatchObject({ code: 'ERR_UNAUTHORIZED' });
    expect(await (await stage.connect('secret')).models()).toHaveLength(3);
  });

  it('is refused beyond the connection limit', async () => {
    stage = await openStage(place, { maxConnections: 1 });
    await stage.connect();
    await expect(stage.connect()).rejects.toMatchObject({
      code: 'ERR_DISCONNECTED',
      message: expect.stringContaining('limit'),
    });
  });

  it('survives bytes that are no HTTP', async () => {
    stage = await openStage(place);
    const socket = createConnection(stage.server.port, '127.0.0.1');
    socket.on('error', () => {});
    socket.resume();
    socket.end('\0\0 nonsense\r\n\r\n');
    await new Promise((resolve) => socket.on('close', resolve));
    expect(await (await stage.connect()).models()).toHaveLength(3);
  });
});

describe('the guard', () => {
  const options = {
    host: '10.0.0.5',
    token: undefined,
    allowHosts: ['GPU.lan'],
    allowOrigins: ['https://ui.example'],
  };

  it.each([
    ['localhost:8700', undefined, true],
    ['127.0.0.1', undefined, true],
    ['[::1]:8700', undefined, true],
    ['192.168.1.9:8700', undefined, true],
    ['gpu.LAN:1', undefined, true],
    ['rebound.example:8700', undefined, false],
    ['', undefined, false],
    ['localhost:8700', 'http://localhost:8700', true],
    ['localhost:8700', 'https://ui.example', true],
    ['localhost:8700', 'http://localhost:9', false],
    ['localhost:8700', 'null', false],
  ])('takes host %j with origin %j: %s', (host, origin, allowed) => {
    expect(refusePlace({ host, origin }, options) === null).toBe(allowed);
  });

  it('compares tokens of any length', () => {
    expect(refuseToken({ authorization: `Bearer ${'x'.repeat(5000)}` }, 'x')?.status).toBe(401);
    expect(refuseToken({ authorization: 'Basic x' }, 'x')?.status).toBe(401);
    expect(refuseToken({ authorization: 'Bearer x' }, 'x')).toBeNull();
  });

  it('keeps a server without a token on loopback', async () => {
    const start = (host: string, token?: string): Promise<unknown> =>
      serve({
        engine: new StandInEngine(),
        log: SILENT,
        models: [place.dir],
        host,
        port: 0,
        ...(token === undefined ? {} : { token }),
      }).then((server) => server.close());
    for (const host of ['0.0.0.0', '::', '192.168.1.1', '127.example']) {
      await expect(start(host)).rejects.toMatchObject({
        message: expect.stringContaining('without a token'),
      });
    }
    for (const token of ['', 'two words', 'schlüssel']) {
      await expect(start('127.0.0.1', token)).rejects.toMatchObject({
        message: expect.stringContaining('visible ASCII'),
      });
    }
    await start('0.0.0.0', 'secret');
    await start('localhost');
  });
});

describe('HTTP', () => {
  it('tells health, readiness, models, statistics and metrics', async () => {
    stage = await openStage(place);
    const get = (path: string): Promise<Response> => fetch(stage!.origin + path);
    expect((await get('/healthz')).status).toBe(200);
    expect((await get('/readyz')).status).toBe(200);
    const client = await stage.connect();
    await client.forward(request('fast.safetensors', 2));
    expect(await (await get('/v1/models')).json()).toMatchObject({
      models: [{ name: 'fast.safetensors', loaded: true }, {}, {}],
    });
    expect(await (await get('/v1/stats')).json()).toMatchObject({ forwards: { images: 2 } });
    const metrics = await (await get('/metrics')).text();
    expect(metrics).toContain('unetd_requests_total{op="forward",result="ok"} 1');
    expect(metrics).toContain('unetd_batch_images_count 1');
    expect(metrics).toContain('unetd_memory_weight_bytes 1000000');
    const page = await get('/');
    expect(page.headers.get('content-type')).toContain('text/html');
    expect(await page.text()).toContain('<title>unetd</title>');
    expect((await get('/nothing')).status).toBe(404);
    expect((await get('/v1')).status).toBe(426);
    expect((await fetch(`${stage.origin}/`, { method: 'POST' })).status).toBe(405);
  });

  it('asks for the token except for health and the page', async () => {
    stage = await openStage(place, { token: 'secret' });
    const status = async (path: string, headers = {}): Promise<number> =>
      (await fetch(stage!.origin + path, { headers })).status;
    for (const path of ['/', '/healthz', '/readyz']) expect(await status(path)).toBe(200);
    for (const path of ['/metrics', '/v1/models', '/v1/stats']) {
      expect(await status(path)).toBe(401);
      expect(await status(path, { authorization: 'Bearer secret' })).toBe(200);
    }
  });
});

describe('draining', () => {
  it('finishes open requests, refuses new ones and then closes', async () => {
    stage = await openStage(place);
    const client = await stage.connect();
    await client.modelLoad('slow.safetensors');
    const open = [1, 2].map((seed) => client.forward(request('slow.safetensors', 1, seed)));
    await new Promise((resolve) => setTimeout(resolve, 30));
    const drained = stage.server.drain();
    await expect(client.forward(request('slow.safetensors'))).rejects.toMatchObject({
      code: 'ERR_SHUTTING_DOWN',
    });
    expect((await fetch(`${stage.origin}/readyz`)).status).toBe(503);
    await expect(stage.connect()).rejects.toMatchObject({ code: 'ERR_DISCONNECTED' });
    expect(await Promise.all(open)).toHaveLength(2);
    await drained;
    await expect(client.models()).rejects.toMatchObject({ code: 'ERR_DISCONNECTED' });
    await expect(fetch(stage.origin)).rejects.toThrow();
  });
});
