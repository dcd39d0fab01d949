/** Limits of frames, windows, queues, memory and patience, over real sockets. */
import { once } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import WebSocket from 'ws';
import type { Client } from '../../src/client.ts';
import { digest, type TensorView } from '../../src/safetensors.ts';
import { cutParts } from '../../src/server/put.ts';
import { encodeBinary } from '../../src/server/wire.ts';
import { comfyPlace, openStage, type Place, request, type Stage, tensor, untilQueued } from './setting.ts';

let place: Place;
let stage: Stage;
let client: Client;

beforeEach(async () => {
  place = comfyPlace(150);
  stage = await openStage(place);
  client = await stage.connect();
});

afterEach(async () => {
  await stage.end();
  place.remove();
});

const FAST = 'fast.safetensors';
const SLOW = 'slow.safetensors';
const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

describe('limits', () => {
  const restage = async (options: Parameters<typeof openStage>[1]): Promise<void> => {
    await stage.end();
    stage = await openStage(place, options);
    client = await stage.connect();
  };

  it('answer a frame that is too large and keep the connection', async () => {
    await restage({ limits: { maxMessageBytes: 2000 } });
    const socket = new WebSocket(stage.server.url, 'unetd.v1');
    await once(socket, 'message');
    socket.send(new Uint8Array(3000));
    const [data] = await once(socket, 'message');
    expect(JSON.parse(String(data))).toMatchObject({ id: null, error: { code: 'ERR_TOO_LARGE' } });
    expect(socket.readyState).toBe(WebSocket.OPEN);
    socket.close();
    await expect(client.forward(request(FAST, 16))).rejects.toMatchObject({ code: 'ERR_TOO_LARGE' });
  });

  it('cut uploads into parts', async () => {
    await restage({ limits: { maxMessageBytes: 4000 } });
    const tensors = Array.from({ length: 9 }, (_, n) => tensor(`t${n}`, new Array(300).fill(n)));
    expect(await client.modelPut(tensors)).toBe(`sha256:${digest(tensors)}`);
    expect((await client.stats()).uploads.files).toBe(1);
    await expect(client.modelPut([tensor('t', new Array(2000).fill(0))])).rejects.toMatchObject({
      code: 'ERR_TOO_LARGE',
    });
  });

  it('leave room for a tensor of an upload that is as large as a frame', async () => {
    const large = (name: string, mebibytes: number): TensorView => ({
      name,
      dtype: 'U8',
      shape: [mebibytes, 1024, 1024],
      data: new Uint8Array(mebibytes * 1024 * 1024).fill(mebibytes),
    });
    const tensors = [large('a', 80), tensor('b', [1]), large('c', 40), large('d', 40), tensor('e', [2])];
    const parts = cutParts(tensors, client.hello.limits.maxMessageBytes);
    expect(parts.map((part) => part.map(({ name }) => name))).toEqual([['a'], ['b', 'c'], ['d', 'e']]);
    const model = await client.modelPut(tensors);
    const { header } = await client.modelHeader(model);
    expect(Object.keys(header.tensors).sort()).toEqual(['a', 'b', 'c', 'd', 'e']);
    expect(header.tensors.a!.shape).toEqual([80, 1024, 1024]);
    const wide = large('a', client.hello.limits.maxMessageBytes / 1024 ** 2);
    await expect(client.modelPut([wide])).rejects.toMatchObject({
      code: 'ERR_TOO_LARGE',
      message: expect.stringContaining('put the file into a folder of the server'),
    });
  });

  it('hold the window of a connection and the queue of the server', async () => {
    await restage({ limits: { maxInFlight: 2 }, queueLimit: 2 });
    await client.modelLoad(SLOW);
    // The client keeps to the window by itself: all are answered.
    await Promise.all([1, 2, 3, 4].map((seed) => client.forward(request(SLOW, 1, seed))));
    const release = stage.engine.hold();
    const socket = new WebSocket(stage.server.url, 'unetd.v1');
    await once(socket, 'message');
    const { model, ...tensors } = request(SLOW);
    const views = Object.entries(tensors).map(([name, value]) => ({ name, ...value }));
    for (const id of ['1', '2', '3']) socket.send(encodeBinary({ id, op: 'forward', model }, views, 'req'));
    const [busy] = await once(socket, 'message');
    expect(JSON.parse(String(busy))).toMatchObject({ id: '3', error: { code: 'ERR_BUSY' } });
    await untilQueued(client, 1, 1);
    const [first, second] = await Promise.all([stage.connect(), stage.connect()]);
    const taken = first.forward(request(SLOW));
    await untilQueued(client, 2, 1);
    await expect(second.forward(request(SLOW))).rejects.toMatchObject({
      code: 'ERR_BUSY',
      details: { retryAfterMs: expect.any(Number) },
    });
    release();
    await taken;
    socket.terminate();
  });

  it('evict kept tensors by size', async () => {
    const bytes = request(FAST).context.data.byteLength;
    await restage({ limits: { maxKeptBytes: 2 * bytes } });
    const { context, ...rest } = request(FAST);
    for (const key of ['a', 'b']) await client.forward({ ...rest, context, keep: { context: key } });
    await client.forward({ ...rest, reuse: { context: 'a' } });
    await client.forward({ ...rest, context, keep: { context: 'c' } });
    await client.forward({ ...rest, reuse: { context: 'a' } });
    await expect(client.forward({ ...rest, reuse: { context: 'b' } })).rejects.toMatchObject({
      code: 'ERR_NOT_KEPT',
    });
  });

  it('stop reading from a peer that does not take its answers, until it does', async () => {
    await restage({ highWaterBytes: 100_000 });
    const reader = await stage.connect();
    const socket = new WebSocket(stage.server.url, 'unetd.v1');
    await once(socket, 'message');
    socket.pause();
    const { model, ...tensors } = request(FAST, 1, 0, 256);
    const views = Object.entries(tensors).map(([name, value]) => ({ name, ...value }));
    for (let id = 0; id < 30; id += 1) {
      socket.send(encodeBinary({ id: String(id), op: 'forward', model }, views, 'req'));
    }
    let before = -1;
    for (let now = 0; now !== before || now === 0; now = (await reader.stats()).forwards.completed) {
      before = now;
      await pause(300);
    }
    expect(before).toBeLessThan(30);
    let answers = 0;
    socket.on('message', () => {
      answers += 1;
    });
    socket.resume();
    while (answers < 30) await once(socket, 'message');
    expect((await reader.stats()).forwards.completed).toBe(30);
    socket.terminate();
  });

  it('hold back a frame while others have announced more than fits, and take it when they have gone', async () => {
    await restage({ limits: { maxMessageBytes: 2000 }, memoryBytes: 1 });
    const { host } = new URL(stage.server.url);
    const announce = async (): Promise<Socket> => {
      const stream = createConnection(Number(host.split(':')[1]), '127.0.0.1');
      const head = ['GET /v1 HTTP/1.1', `Host: ${host}`, 'Connection: Upgrade', 'Upgrade: websocket'];
      const keys = ['Sec-WebSocket-Version: 13', `Sec-WebSocket-Key: ${'A'.repeat(22)}==`];
      stream.write([...head, ...keys, 'Sec-WebSocket-Protocol: unetd.v1', '', ''].join('\r\n'));
      await once(stream, 'data');
      // 48 MiB of a binary message, of which nothing comes.
      stream.write(Buffer.from([0x82, 0xff, 0, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3, 4]));
      return stream;
    };
    const greedy = [await announce(), await announce()];
    const socket = new WebSocket(stage.server.url, 'unetd.v1');
    await once(socket, 'message');
    await pause(50);
    socket.send(new Uint8Array(60 * 1024 * 1024));
    const answer = once(socket, 'message');
    expect(await Promise.race([answer, pause(500)])).toBeUndefined();
    // Small requests go on.
    expect((await client.stats()).connections).toBe(4);
    greedy[0]!.destroy();
    expect(JSON.parse(String((await answer)[0]))).toMatchObject({
      id: null,
      error: { code: 'ERR_TOO_LARGE' },
    });
    greedy[1]!.destroy();
    socket.terminate();
  });

  it('hold for text frames and for headers, whose JSON takes more than its length', async () => {
    const socket = new WebSocket(stage.server.url, 'unetd.v1');
    await once(socket, 'message');
    const header = Buffer.alloc(5_000_000, ' ');
    const frame = Buffer.concat([Buffer.alloc(8), header]);
    frame.writeBigUInt64LE(BigInt(header.byteLength));
    for (const bytes of [`"${' '.repeat(1_100_000)}"`, frame]) {
      socket.send(bytes);
      const [data] = await once(socket, 'message');
      expect(JSON.parse(String(data))).toMatchObject({ id: null, error: { code: 'ERR_TOO_LARGE' } });
    }
    socket.terminate();
  });

  it('end a peer that answers no pings', async () => {
    await restage({ pingMs: 30 });
    const socket = new WebSocket(stage.server.url, 'unetd.v1', { autoPong: false });
    await once(socket, 'message');
    const since = performance.now();
    await once(socket, 'close');
    expect(performance.now() - since).toBeGreaterThan(50);
    expect((await client.stats()).connections).toBe(1);
  });
});
