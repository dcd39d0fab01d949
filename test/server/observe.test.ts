/** What can be seen of a running server: metrics that add up, the LoRAs that gateways look for, and a log to follow a request. */
import { once } from 'node:events';
import { Writable } from 'node:stream';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import WebSocket from 'ws';
import { type Client, tensorFrom } from '../../src/client.ts';
import { SERIES } from '../../src/server/exposition.ts';
import type { Logger } from '../../src/server/log.ts';
import { Metrics } from '../../src/server/metrics.ts';
import { declaredTypes, labelsOf, parseMetrics } from './prometheus.ts';
import { comfyPlace, openStage, type Place, request, type Stage, untilQueued } from './setting.ts';
import { TROUBLE } from './stand-in-engine.ts';

const FAST = 'fast.safetensors';
const SLOW = 'slow.safetensors';

let place: Place;
let stage: Stage;
let client: Client;

beforeEach(async () => {
  place = comfyPlace(40);
  stage = await openStage(place);
  client = await stage.connect();
});

afterEach(async () => {
  await stage.end();
  place.remove();
});

const metricsText = async (): Promise<string> => (await fetch(`${stage.origin}/metrics`)).text();
const use = (lora: string) => ({ loras: [{ lora, strength: 1 }] });

describe('metrics', () => {
  it('count requests, images, steps and errors, by model and by code', async () => {
    await client.forward({ ...request(FAST, 2), ...use('double.safetensors') });
    await client.forward(request(SLOW));
    await client.forward(request(SLOW));
    await client.forward(request('none.safetensors')).catch(() => {});
    await client.forward({ ...request(FAST), ...use('none.safetensors') }).catch(() => {});
    const abort = new AbortController();
    const cancelled = client.forward(request(SLOW), { signal: abort.signal });
    await untilQueued(client, 0, 1);
    abort.abort();
    await expect(cancelled).rejects.toMatchObject({ code: 'ERR_CANCELLED' });
    await untilQueued(client, 0, 0);
    const found = parseMetrics(await metricsText());
    for (const [series, value] of Object.entries({
      'unetd_requests_total{op="forward",result="ok"}': 3,
      'unetd_requests_total{op="forward",result="ERR_UNKNOWN_MODEL"}': 1,
      'unetd_requests_total{op="forward",result="ERR_UNKNOWN_LORA"}': 1,
      'unetd_requests_total{op="forward",result="ERR_CANCELLED"}': 1,
      [`unetd_forwards_total{model="${FAST}"}`]: 1,
      [`unetd_forwards_total{model="${SLOW}"}`]: 2,
      [`unetd_images_total{model="${FAST}"}`]: 2,
      // The cancelled one ran too: the GPU does not know that nobody waits.
      [`unetd_gpu_seconds_count{model="${SLOW}"}`]: 3,
      [`unetd_gpu_seconds_sum{model="${SLOW}"}`]: 0.12,
      [`unetd_gpu_seconds_bucket{le="0.025",model="${SLOW}"}`]: 0,
      [`unetd_gpu_seconds_bucket{le="0.05",model="${SLOW}"}`]: 3,
      unetd_batch_images_count: 4,
      unetd_batch_images_sum: 5,
      unetd_batch_requests_sum: 4,
      unetd_forward_seconds_count: 3,
      unetd_queue_seconds_count: 3,
      [`unetd_model_weight_bytes{model="${FAST}",dtype="f16"}`]: 1000,
      [`unetd_adapters{model="${FAST}"}`]: 1,
      [`unetd_adapter_bytes{model="${FAST}"}`]: 4,
      unetd_adapter_loads_total: 1,
      unetd_model_loads_total: 2,
      unetd_model_evictions_total: 0,
      unetd_memory_budget_bytes: 1e9,
      unetd_connections: 1,
    }))
      expect(found.get(series), series).toBeCloseTo(value, 9);
    expect(found.get('unetd_batch_seconds_sum')).toBeGreaterThanOrEqual(0.12);
    expect(found.get('process_resident_memory_bytes')).toBeGreaterThan(1e7);
  });

  it('count the bytes on the sockets, those of connections that ended included', async () => {
    const before = parseMetrics(await metricsText());
    const other = await stage.connect();
    // The batch of one image of 64 x 64 is 64 KiB each way.
    await other.forward(request(FAST, 1, 0, 64));
    await other.close();
    await expect.poll(async () => parseMetrics(await metricsText()).get('unetd_connections')).toBe(1);
    const after = parseMetrics(await metricsText());
    for (const name of ['unetd_received_bytes_total', 'unetd_sent_bytes_total']) {
      const bytes = after.get(name)! - before.get(name)!;
      expect(bytes).toBeGreaterThan(65_536);
      expect(bytes).toBeLessThan(65_536 + 3000);
    }
    expect(after.get('unetd_connections_accepted_total')).toBe(2);
  });

  it('say what memory requests hold, from their arrival until they are answered', async () => {
    const held = async (): Promise<number | undefined> =>
      parseMetrics(await metricsText()).get('unetd_incoming_bytes');
    await client.modelLoad(FAST);
    const release = stage.engine.hold();
    const sent = request(FAST, 1, 0, 256);
    const open = [client.forward(sent), client.forward(sent)];
    const bytes = 2 * (sent.x.data.byteLength + sent.context.data.byteLength);
    await expect.poll(held).toBeGreaterThan(bytes);
    expect(await held()).toBeLessThan(bytes + 2000);
    expect(parseMetrics(await metricsText()).get('unetd_incoming_limit_bytes')).toBeGreaterThan(bytes);
    release();
    await Promise.all(open);
    await expect.poll(held).toBe(0);
  });

  it('count refused upgrades', async () => {
    const socket = new WebSocket(stage.server.url, 'unetd.v2');
    await once(socket, 'error');
    expect(parseMetrics(await metricsText()).get('unetd_connections_refused_total')).toBe(1);
  });

  it('have the type their name says, and are those of the statistics', async () => {
    await client.forward({ ...request(FAST), ...use('double.safetensors') });
    const text = await metricsText();
    for (const [name, type] of declaredTypes(text))
      expect(type === 'counter', `${name} is a ${type}`).toBe(name.endsWith('_total'));
    const found = parseMetrics(text);
    const stats = await client.stats();
    for (const [name, { read }] of Object.entries(SERIES)) {
      if (/uptime|bytes_total|process_|lora_requests/.test(name)) continue;
      const value = read(stats);
      if (typeof value === 'number') expect(found.get(name), name).toBe(value);
      else
        for (const [labels, each] of value) {
          const list = Object.entries(labels).map(([key, text]) => `${key}="${text}"`);
          expect(found.get(`${name}{${list}}`), name).toBe(each);
        }
    }
  });

  it('name no more models than fit, however many are used', () => {
    const metrics = new Metrics();
    for (let i = 0; i < 1000; i += 1)
      metrics.stepped({ model: `model ${i}`, requests: 1, images: 1, gpuMs: 1, elapsedMs: 1 });
    const { work } = metrics.stats(
      {
        ...{ server: 'unetd/0', ready: true, restarts: 0, peers: [], waitingLoras: [] },
        traffic: { receivedBytes: 0, sentBytes: 0, accepted: 0, refused: 0 },
        queue: { requests: 0, limit: 1, running: 0 },
        incoming: { bytes: 0, limitBytes: 1 },
        kept: { tensors: 0, bytes: 0 },
        uploads: { files: 0, bytes: 0, quotaBytes: 0 },
      },
      {} as never,
    );
    expect(work).toHaveLength(257);
    expect(work.at(-1)).toMatchObject({ model: 'other', steps: 744 });
  });
});

describe('unetd_lora_requests_info', () => {
  const info = async (): Promise<Readonly<Record<string, string>>> =>
    labelsOf(await metricsText(), 'unetd_lora_requests_info');

  it('lists the adapters on the GPU, those waited for, and how many have room', async () => {
    expect(await info()).toEqual({
      running_lora_adapters: '',
      waiting_lora_adapters: '',
      // The stand-in has room for 40 bytes, and none is loaded that would tell how small its adapters are.
      max_lora: '0',
    });
    const release = stage.engine.hold();
    const first = client.forward({ ...request(FAST), ...use('double.safetensors') });
    await untilQueued(client, 0, 1);
    expect(await info()).toEqual({
      running_lora_adapters: 'double.safetensors',
      waiting_lora_adapters: '',
      max_lora: '10',
    });
    const second = client.forward({ ...request(FAST), ...use('styles/minus.safetensors') });
    await untilQueued(client, 1, 1);
    expect(await info()).toEqual({
      running_lora_adapters: 'double.safetensors,styles/minus.safetensors',
      waiting_lora_adapters: 'styles/minus.safetensors',
      max_lora: '10',
    });
    release();
    await Promise.all([first, second]);
    expect((await info()).waiting_lora_adapters).toBe('');
    const time = parseMetrics(await metricsText()).entries();
    const [, value] = [...time].find(([series]) => series.startsWith('unetd_lora_requests_info'))!;
    expect(Math.abs(value - Date.now() / 1000)).toBeLessThan(5);
  });

  it('forgets a waiting request that is cancelled, or fails', async () => {
    const release = stage.engine.hold();
    const running = client.forward(request(FAST));
    await untilQueued(client, 0, 1);
    const abort = new AbortController();
    const waiting = client.forward(
      { ...request(FAST), ...use('double.safetensors') },
      { signal: abort.signal },
    );
    await untilQueued(client, 1, 1);
    expect((await info()).waiting_lora_adapters).toBe('double.safetensors');
    abort.abort();
    await expect(waiting).rejects.toMatchObject({ code: 'ERR_CANCELLED' });
    await client.forward({ ...request(FAST), ...use('none.safetensors') }).catch(() => {});
    expect((await info()).waiting_lora_adapters).toBe('');
    release();
    await running;
  });
});

describe('statistics of connections', () => {
  it('say who does what, until the connection ends', async () => {
    const other = await stage.connect();
    await other.forward(request(FAST, 3));
    const { peers } = await client.stats();
    expect(peers).toMatchObject([
      { owner: 'connection 1', forwards: 0, images: 0, openRequests: 1 },
      { owner: 'connection 2', from: '127.0.0.1', forwards: 1, images: 3, openRequests: 0 },
    ]);
    expect(peers[1]!.receivedBytes).toBeGreaterThan(3 * 4 * 4 * 4 * 4);
    await other.close();
    await expect.poll(async () => (await client.stats()).peers.length).toBe(1);
  });
});

describe('the log', () => {
  const open = async (level: string): Promise<Record<string, unknown>[]> => {
    await stage.end();
    const lines: Record<string, unknown>[] = [];
    const sink = new Writable({
      write: (chunk, _encoding, done) => {
        lines.push(JSON.parse(String(chunk)));
        done();
      },
    });
    const log: Logger = pino({ level, base: null }, sink);
    stage = await openStage(place, { log });
    client = await stage.connect();
    return lines;
  };

  it('lets a request be followed from its connection to its answer at level debug', async () => {
    const lines = await open('debug');
    await client.forward({ ...request(FAST, 2), ...use('double.safetensors') });
    await client.forward(request('none.safetensors')).catch(() => {});
    const owner = 'connection 1';
    const op = 'forward';
    expect(lines).toMatchObject([
      { msg: 'connected', level: 30, owner, from: '127.0.0.1' },
      { msg: 'request', level: 20, owner, id: '1', op, model: FAST, loras: 1, images: 2 },
      { msg: 'model loaded', level: 30, model: FAST, dtype: 'f16', sizeBytes: 1000 },
      { msg: 'LoRA loaded', level: 20, lora: 'double.safetensors', model: FAST, unmatched: 0 },
      {
        ...{ msg: 'answered', level: 20, owner, id: '1', op, queueMs: expect.any(Number), gpuMs: 0 },
        ...{ batch: 2, batchedRequests: 1 },
      },
      { msg: 'request', owner, id: '2', op, model: 'none.safetensors' },
      { msg: expect.stringContaining('none.safetensors'), level: 20, owner, id: '2', op },
    ]);
    expect(lines.at(-1)).toMatchObject({ code: 'ERR_UNKNOWN_MODEL' });
  });

  it('has no line per request at level info, and says at the end of a connection what it got', async () => {
    const lines = await open('info');
    for (let i = 0; i < 50; i += 1) await client.forward(request(FAST));
    await client.forward(request('none.safetensors')).catch(() => {});
    await client.close();
    await expect.poll(() => lines.length).toBe(3);
    expect(lines).toMatchObject([
      { msg: 'connected' },
      { msg: 'model loaded' },
      { msg: 'disconnected', code: 1000, forwards: 50, images: 50, receivedBytes: expect.any(Number) },
    ]);
  });

  it('has errors that no client causes at level error', async () => {
    const lines = await open('info');
    const values = new Float32Array(18).fill(TROUBLE.gpuError);
    await client.forward({ ...request(FAST), context: tensorFrom(values, [1, 3, 6]) }).catch(() => {});
    expect(lines.at(-1)).toMatchObject({ level: 50, code: 'ERR_GPU', id: '1', owner: 'connection 1' });
  });
});
