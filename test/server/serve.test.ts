/** The whole server over real sockets, with the stand-in engine: every operation, and everything clients do wrong. */
import { once } from 'node:events';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import WebSocket from 'ws';
import { type Client, type ClientTensor, floatsOf } from '../../src/client.ts';
import { digest } from '../../src/safetensors.ts';
import { encodeBinary } from '../../src/server/wire.ts';
import { comfyPlace, filled, openStage, type Place, request, type Stage, tensor } from './setting.ts';
import { standInResult, TROUBLE } from './stand-in-engine.ts';

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
const factors = new Map([
  ['double.safetensors', 1],
  ['styles/minus.safetensors', -0.5],
]);

type Forward = ReturnType<typeof request> & { loras?: { lora: string; strength: number }[] };

function expectRight(out: ClientTensor, sent: Forward): void {
  const right = standInResult({ loras: [], ...sent }, factors);
  expect(out.shape).toEqual(right.shape);
  expect(out.dtype).toBe(right.dtype);
  expect(floatsOf(out)).toEqual(floatsOf(right));
}

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

describe('operations', () => {
  it('greet, list, load, unload', async () => {
    expect(client.hello).toMatchObject({
      event: 'hello',
      protocol: 1,
      server: expect.stringMatching(/^unetd\/\d/),
      device: { name: 'stand-in' },
      limits: { maxInFlight: 32 },
    });
    expect((await client.models()).map(({ name, loaded }) => [name, loaded])).toEqual([
      [FAST, false],
      [SLOW, false],
      ['sub/small.safetensors', false],
    ]);
    const stages: string[] = [];
    const info = await client.modelLoad(FAST, {
      dtype: 'f32',
      onProgress: (p) => stages.push(`${p.stage} ${p.done}`),
    });
    expect(info).toMatchObject({ model: FAST, dtype: 'f32', config: { inChannels: 4 } });
    expect(stages.at(-1)).toBe('weights 3');
    expect(await client.modelLoad(FAST)).toEqual(info);
    expect(stage.engine.loads).toEqual([FAST]);
    expect((await client.models())[0]).toMatchObject({ loaded: true, config: { inChannels: 4 } });
    await client.modelUnload(FAST);
    await expect(client.modelUnload(FAST)).rejects.toMatchObject({ code: 'ERR_MODEL_NOT_LOADED' });
    await expect(client.modelUnload('none.safetensors')).rejects.toMatchObject({ code: 'ERR_UNKNOWN_MODEL' });
  });

  it('load a model once for all who ask at the same time', async () => {
    await Promise.all([client.modelLoad(SLOW), client.modelLoad(SLOW), client.forward(request(SLOW))]);
    expect(stage.engine.loads).toEqual([SLOW]);
  });

  it('read the header of a model without loading it', async () => {
    const { header, values } = await client.modelHeader(FAST, ['small']);
    expect(header.tensors).toEqual({
      small: { dtype: 'F32', shape: [3] },
      large: { dtype: 'F32', shape: [20_000] },
    });
    expect([...floatsOf(values.get('small')!)]).toEqual([1, 2, 3]);
    expect(stage.engine.loads).toEqual([]);
  });

  it('list and load LoRAs', async () => {
    expect((await client.loras()).map(({ name }) => name)).toEqual([...factors.keys()]);
    expect(await client.loraLoad('double.safetensors', FAST)).toMatchObject({
      format: 'stand-in',
      unmatched: [],
    });
    await expect(client.loraLoad('none.safetensors', FAST)).rejects.toMatchObject({
      code: 'ERR_UNKNOWN_LORA',
    });
  });

  it('take uploads and use them by digest', async () => {
    const tensors = [tensor('factor', [3])];
    const name = await client.loraPut(tensors);
    expect(name).toBe(`sha256:${digest(tensors)}`);
    expect(await client.loraPut(tensors)).toBe(name);
    expect(await client.loraHas([digest(tensors), '0'.repeat(64)])).toEqual(['0'.repeat(64)]);
    const sent = { ...request(FAST), loras: [{ lora: name, strength: 1 }] };
    const { out } = await client.forward(sent);
    expect(floatsOf(out)).toEqual(floatsOf(standInResult(sent, new Map([[name, 3]]))));
  });

  it('give statistics', async () => {
    await client.forward(request(FAST, 2));
    expect(await client.stats()).toMatchObject({
      ready: true,
      connections: 1,
      queue: { requests: 0, running: 0 },
      forwards: { completed: 1, failed: 0, images: 2, batches: 1, meanBatchImages: 2 },
      engine: { models: [{ model: FAST }] },
    });
  });
});

describe('forward', () => {
  it('loads model and LoRAs by itself and answers in the dtype of x', async () => {
    const sent: Forward = {
      ...request(FAST, 2),
      loras: [
        { lora: 'double.safetensors', strength: 0.5 },
        { lora: 'styles/minus.safetensors', strength: -2 },
      ],
    };
    const { out, timing } = await client.forward(sent);
    expectRight(out, sent);
    expect(timing).toMatchObject({ batch: 2, batchedRequests: 1 });
    const half = { ...sent, x: filled([2, 4, 4, 4], 0, 'F16') };
    expectRight((await client.forward(half)).out, half);
  });

  it('batches requests of several connections, each with its own LoRAs', async () => {
    const others = await Promise.all([1, 2, 3].map(() => stage.connect()));
    const all = [client, ...others].map((each, seed): [Client, Forward] => [
      each,
      { ...request(SLOW, 1, seed), loras: [{ lora: 'double.safetensors', strength: seed }] },
    ]);
    await client.loraLoad('double.safetensors', SLOW);
    const first = client.forward(request(SLOW));
    await pause(50);
    const results = await Promise.all(all.map(([each, sent]) => each.forward(sent)));
    for (const [index, { out, timing }] of results.entries()) {
      expectRight(out, all[index]![1]);
      expect(timing).toMatchObject({ batch: 4, batchedRequests: 4 });
    }
    await first;
    expect(stage.engine.batches.map(({ requests }) => requests)).toEqual([1, 4]);
  });

  it('fails alone when it is bad', async () => {
    await client.modelLoad(SLOW);
    const first = client.forward(request(SLOW));
    const bad = request(SLOW, 1, 1);
    new DataView(bad.context.data.buffer).setFloat32(0, TROUBLE.gpuError, true);
    const good = request(SLOW, 1, 2);
    const [, failed, passed] = await Promise.allSettled([first, client.forward(bad), client.forward(good)]);
    expect(failed).toMatchObject({ status: 'rejected', reason: { code: 'ERR_GPU' } });
    if (passed?.status !== 'fulfilled') throw new Error('the good request failed');
    expectRight(passed.value.out, good);
  });

  it('is cut when memory is short, and smaller batches follow', async () => {
    const sent = request('sub/small.safetensors', 5);
    expectRight((await client.forward(sent)).out, sent);
    expectRight((await client.forward(sent)).out, sent);
    expect(Math.max(...stage.engine.batches.map(({ images }) => images))).toBe(2);
  });

  it('reuses kept tensors, and says so when they are gone', async () => {
    const { context, ...rest } = request(FAST);
    await client.forward({ ...rest, context, keep: { context: 'prompt' } });
    const { out } = await client.forward({ ...rest, reuse: { context: 'prompt' } });
    expectRight(out, { ...rest, context });
    expect((await client.stats()).kept).toEqual({ tensors: 1, bytes: context.data.byteLength });
    await expect(client.forward({ ...rest, reuse: { context: 'other' } })).rejects.toMatchObject({
      code: 'ERR_NOT_KEPT',
      details: { key: 'other' },
    });
    const other = await stage.connect();
    await expect(other.forward({ ...rest, reuse: { context: 'prompt' } })).rejects.toMatchObject({
      code: 'ERR_NOT_KEPT',
    });
  });

  it('passes control residuals on as ComfyUI lists them', async () => {
    const seen: unknown[] = [];
    const forward = stage.engine.forward.bind(stage.engine);
    stage.engine.forward = (batch) => {
      seen.push(batch.requests[0]?.control?.input?.map((entry) => entry?.shape ?? null));
      return forward(batch);
    };
    const full = filled([1, 8, 4, 4]);
    const halved = filled([1, 8, 2, 2]);
    await client.forward({ ...request(FAST), control: { input: [null, null, halved, full] } });
    await client.forward({ ...request(FAST), control: { input: [null, halved, null] } });
    expect(seen).toEqual([
      [null, [1, 8, 2, 2], [1, 8, 4, 4]],
      [null, [1, 8, 2, 2], null],
    ]);
    await expect(
      client.forward({ ...request(FAST), control: { input: [full, null] } }),
    ).rejects.toMatchObject({
      code: 'ERR_BAD_SHAPE',
    });
  });

  it('survives an engine that dropped the model', async () => {
    await client.forward(request(FAST));
    stage.engine.evictAll();
    const sent: Forward = { ...request(FAST), loras: [{ lora: 'double.safetensors', strength: 1 }] };
    await client.forward(request(FAST));
    stage.engine.evictAll();
    expectRight((await client.forward(sent)).out, sent);
  });

  it('takes a LoRA file anew when it has changed', async () => {
    const sent: Forward = { ...request(FAST), loras: [{ lora: 'double.safetensors', strength: 1 }] };
    await client.forward(sent);
    place.write('loras/double.safetensors', (await import('./setting.ts')).loraFile(9));
    await pause(1100);
    const { out } = await client.forward(sent);
    expect(floatsOf(out)).toEqual(
      floatsOf(standInResult({ loras: [], ...sent }, new Map([['double.safetensors', 9]]))),
    );
  });

  it('keeps its model from being unloaded', async () => {
    await client.modelLoad(SLOW);
    const running = client.forward(request(SLOW));
    await pause(20);
    await expect(client.modelUnload(SLOW)).rejects.toMatchObject({ code: 'ERR_MODEL_BUSY' });
    await running;
    await client.modelUnload(SLOW);
  });

  it.each<[string, object, string]>([
    ['an unknown model', { model: 'none.safetensors' }, 'ERR_UNKNOWN_MODEL'],
    ['a path', { model: '../x.safetensors' }, 'ERR_BAD_REQUEST'],
    ['an unknown LoRA', { loras: [{ lora: 'none.safetensors', strength: 1 }] }, 'ERR_UNKNOWN_LORA'],
    [
      'a strength that JSON cannot hold',
      { loras: [{ lora: 'a', strength: Number.NaN }] },
      'ERR_BAD_STRENGTH',
    ],
    ['a LoRA without strength', { loras: [{ lora: 'a' }] }, 'ERR_BAD_STRENGTH'],
    ['loras that are no list', { loras: 'double.safetensors' }, 'ERR_BAD_REQUEST'],
    ['a wrong shape', { timesteps: filled([3]) }, 'ERR_BAD_SHAPE'],
    ['an unknown field', { lora: 'x' }, 'ERR_BAD_REQUEST'],
    ['keeping what is not there', { keep: { y: 'k' } }, 'ERR_BAD_REQUEST'],
    ['a tensor both sent and reused', { keep: { x: 'k' }, reuse: { x: 'k' } }, 'ERR_BAD_REQUEST'],
    [
      'list lengths that are too short',
      { control: { input: [filled([1, 8, 4, 4])] }, keep: { z: '' } },
      'ERR_BAD_REQUEST',
    ],
  ])('refuses %s and goes on', async (_what, changes, code) => {
    await expect(client.forward({ ...request(FAST), ...changes })).rejects.toMatchObject({ code });
    await client.forward(request(FAST));
  });
});

describe('cancelling', () => {
  it('answers the request at once and runs the rest', async () => {
    await client.modelLoad(SLOW);
    const running = client.forward(request(SLOW));
    const controller = new AbortController();
    const waiting = client.forward(request(SLOW, 1, 1), { signal: controller.signal });
    await pause(20);
    const before = performance.now();
    controller.abort();
    await expect(waiting).rejects.toMatchObject({ code: 'ERR_CANCELLED' });
    expect(performance.now() - before).toBeLessThan(100);
    await running;
    expect(stage.engine.batches).toHaveLength(1);
    expect(await client.cancel('77')).toBe(false);
    expect((await client.stats()).forwards).toMatchObject({ completed: 1, cancelled: 1 });
  });

  it('also happens when the connection ends', async () => {
    await client.modelLoad(SLOW);
    const running = client.forward(request(SLOW));
    const leaver = await stage.connect();
    const lost = leaver.forward(request(SLOW, 1, 1));
    await pause(30);
    expect((await client.stats()).queue.requests).toBe(1);
    await leaver.close();
    await expect(lost).rejects.toMatchObject({ code: 'ERR_DISCONNECTED' });
    await pause(20);
    expect((await client.stats()).queue.requests).toBe(0);
    await running;
    expect(stage.engine.batches).toHaveLength(1);
  });
});

describe('a raw socket', () => {
  const open = async (): Promise<{ socket: WebSocket; next: () => Promise<Record<string, unknown>> }> => {
    const socket = new WebSocket(stage.server.url, 'unetd.v1', { perMessageDeflate: false });
    const queue: Record<string, unknown>[] = [];
    socket.on('message', (data) => queue.push(JSON.parse(data.toString())));
    const next = async (): Promise<Record<string, unknown>> => {
      while (queue.length === 0) await once(socket, 'message');
      return queue.shift()!;
    };
    expect(await next()).toMatchObject({ event: 'hello' });
    return { socket, next };
  };

  it('gets an error with id null for what is no request, and stays open', async () => {
    const { socket, next } = await open();
    const frames: [string | Uint8Array, string | null, string][] = [
      ['no json', null, 'ERR_BAD_FRAME'],
      [new Uint8Array(20), null, 'ERR_BAD_FRAME'],
      ['{"op":"stats"}', null, 'ERR_BAD_REQUEST'],
      ['{"id":7,"op":"stats"}', null, 'ERR_BAD_REQUEST'],
      ['{"id":"1"}', '1', 'ERR_BAD_REQUEST'],
      ['{"id":"1","op":"constructor"}', '1', 'ERR_UNKNOWN_OP'],
      ['{"id":"1","op":"forward"}', null, 'ERR_BAD_FRAME'],
      [encodeBinary({ id: '1', op: 'stats' }, [], 'req'), null, 'ERR_BAD_FRAME'],
      ['{"id":"1","op":"stats","more":1}', '1', 'ERR_BAD_REQUEST'],
      [encodeBinary({ id: '1', op: 'forward', model: FAST }, [], 'req'), '1', 'ERR_MISSING_TENSOR'],
      [
        encodeBinary({ id: '1', op: 'forward', model: FAST }, [tensor('z', [1])], 'req'),
        '1',
        'ERR_UNEXPECTED_TENSOR',
      ],
    ];
    for (const [frame, id, code] of frames) {
      socket.send(frame);
      expect(await next()).toMatchObject({ id, ok: false, error: { code, message: expect.any(String) } });
    }
    socket.send('{"id":"1","op":"stats"}');
    expect(await next()).toMatchObject({ id: '1', ok: true });
    socket.close();
  });

  it('may not use an id twice at a time', async () => {
    await client.modelLoad(SLOW);
    const { socket, next } = await open();
    const { model, ...tensors } = request(SLOW);
    const views = Object.entries(tensors).map(([name, value]) => ({ name, ...value }));
    const frame = encodeBinary({ id: 'a', op: 'forward', model }, views, 'req');
    socket.once('message', () => {});
    socket.send(frame);
    socket.send('{"id":"a","op":"stats"}');
    expect(await next()).toMatchObject({
      id: null,
      error: { code: 'ERR_DUPLICATE_ID', details: { id: 'a' } },
    });
    socket.terminate();
  });
});

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

  it('hold the window of a connection and the queue of the server', async () => {
    await restage({ limits: { maxInFlight: 2 }, queueLimit: 2 });
    await client.modelLoad(SLOW);
    // The client keeps to the window by itself: all are answered.
    await Promise.all([1, 2, 3, 4].map((seed) => client.forward(request(SLOW, 1, seed))));
    const socket = new WebSocket(stage.server.url, 'unetd.v1');
    await once(socket, 'message');
    const answers: string[] = [];
    socket.on('message', (data, isBinary) => {
      if (!isBinary) answers.push(JSON.parse(String(data)).error.code);
    });
    const { model, ...tensors } = request(SLOW);
    const views = Object.entries(tensors).map(([name, value]) => ({ name, ...value }));
    for (const id of ['1', '2', '3']) socket.send(encodeBinary({ id, op: 'forward', model }, views, 'req'));
    await pause(50);
    expect(answers).toEqual(['ERR_BUSY']);
    const others = await Promise.all([stage.connect(), stage.connect()]);
    const results = await Promise.allSettled(others.map((each) => each.forward(request(SLOW))));
    expect(results.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
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
