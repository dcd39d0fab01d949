import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type Client, type ClientTensor, floatsOf } from '../../src/client.ts';
import { comfyPlace, filled, openStage, type Place, request, type Stage, untilQueued } from './setting.ts';
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
    const release = stage.engine.hold();
    const first = client.forward(request(SLOW));
    await untilQueued(client, 0, 1);
    const batched = all.map(([each, sent]) => each.forward(sent));
    await untilQueued(client, 4, 1);
    release();
    const results = await Promise.all(batched);
    for (const [index, { out, timing }] of results.entries()) {
      expectRight(out, all[index]![1]);
      expect(timing).toMatchObject({ batch: 4, batchedRequests: 4 });
    }
    await first;
    expect(stage.engine.batches.map(({ requests }) => requests)).toEqual([1, 4]);
  });

  it('fails alone when it is bad', async () => {
    await client.modelLoad(SLOW);
    const release = stage.engine.hold();
    const first = client.forward(request(SLOW));
    await untilQueued(client, 0, 1);
    const bad = request(SLOW, 1, 1);
    new DataView(bad.context.data.buffer).setFloat32(0, TROUBLE.gpuError, true);
    const good = request(SLOW, 1, 2);
    const batched = [client.forward(bad), client.forward(good)];
    await untilQueued(client, 2, 1);
    release();
    const [failed, passed] = await Promise.allSettled(batched);
    await first;
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
    const release = stage.engine.hold();
    const running = client.forward(request(SLOW));
    await untilQueued(client, 0, 1);
    await expect(client.modelUnload(SLOW)).rejects.toMatchObject({ code: 'ERR_MODEL_BUSY' });
    release();
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
    const release = stage.engine.hold();
    const running = client.forward(request(SLOW));
    await untilQueued(client, 0, 1);
    const controller = new AbortController();
    const waiting = client.forward(request(SLOW, 1, 1), { signal: controller.signal });
    await untilQueued(client, 1, 1);
    controller.abort();
    await expect(waiting).rejects.toMatchObject({ code: 'ERR_CANCELLED' });
    release();
    await running;
    expect(stage.engine.batches).toHaveLength(1);
    expect(await client.cancel('77')).toBe(false);
    expect((await client.stats()).forwards).toMatchObject({ completed: 1, cancelled: 1 });
  });

  it('answers a running request too, whose model stays in use until its batch ends', async () => {
    await client.modelLoad(SLOW);
    const release = stage.engine.hold();
    const controller = new AbortController();
    const running = client.forward(request(SLOW), { signal: controller.signal });
    await untilQueued(client, 0, 1);
    controller.abort();
    await expect(running).rejects.toMatchObject({ code: 'ERR_CANCELLED' });
    await expect(client.modelUnload(SLOW)).rejects.toMatchObject({ code: 'ERR_MODEL_BUSY' });
    release();
    await untilQueued(client, 0, 0);
    await client.modelUnload(SLOW);
  });

  it('also happens when the connection ends', async () => {
    await client.modelLoad(SLOW);
    const release = stage.engine.hold();
    const running = client.forward(request(SLOW));
    await untilQueued(client, 0, 1);
    const leaver = await stage.connect();
    const lost = leaver.forward(request(SLOW, 1, 1));
    lost.catch(() => {});
    await untilQueued(client, 1, 1);
    await leaver.close();
    await expect(lost).rejects.toMatchObject({ code: 'ERR_DISCONNECTED' });
    await untilQueued(client, 0, 1);
    release();
    await running;
    expect(stage.engine.batches).toHaveLength(1);
  });
});
