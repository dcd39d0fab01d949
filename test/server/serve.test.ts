/** The whole server over real sockets, with the stand-in engine: every operation, and frames that are no requests. */
import { once } from 'node:events';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import WebSocket from 'ws';
import { type Client, floatsOf } from '../../src/client.ts';
import { digest } from '../../src/safetensors.ts';
import { encodeBinary } from '../../src/server/wire.ts';
import { comfyPlace, openStage, type Place, request, type Stage, tensor } from './setting.ts';
import { standInResult } from './stand-in-engine.ts';

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

  it('load a model as it is loaded already when no dtype is asked for, whatever the default of the server', async () => {
    const f16 = await openStage(place, { dtype: 'f16' });
    const other = await f16.connect();
    const info = await other.modelLoad(FAST, { dtype: 'f32' });
    expect(await other.modelLoad(FAST)).toEqual(info);
    expect(await other.modelLoad(FAST, { dtype: 'auto' })).toEqual(info);
    expect((await other.modelLoad(SLOW)).dtype).toBe('f16');
    expect(f16.engine.loads).toEqual([FAST, SLOW]);
    await f16.end();
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
