/**
 * What a flood costs others, in batches. First with the batcher alone on a clock that the test moves, then over real sockets with an
 * engine whose every batch takes the same time.
 */
import { once } from 'node:events';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import WebSocket from 'ws';
import type { Client } from '../../src/client.ts';
import { Batcher } from '../../src/server/batcher.ts';
import { encodeBinary } from '../../src/server/wire.ts';
import { comfyPlace, openStage, request } from './setting.ts';
import { TestClock } from './test-clock.ts';

const OPEN = 64;
const MOST = 2.2;
/** The most of a batch that is left when the next one is taken. */
const EARLY = 0.25;

const settle = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)]!;

interface Flood {
  readonly owner: string;
  readonly key: string;
  /** Milliseconds of a batch that it leads. */
  readonly batchMs: number;
}

/** Latencies of a connection that has one request open at a time and pauses between, while others always have 64 open. */
async function simulate(floods: readonly Flood[], key: string, pauses: readonly number[]): Promise<number[]> {
  const clock = new TestClock();
  const latencies: number[] = [];
  /** The batches that were taken: the engine runs the first. */
  const taken: { left: number; readonly finish: () => void }[] = [];
  const batcher = new Batcher<number, number>(
    { capOf: () => 8, waitMs: 0, queueLimit: 10_000 },
    (jobs) =>
      new Promise((resolve) => {
        const finish = (): void => resolve(jobs.map(({ work }) => ({ status: 'fulfilled', value: work })));
        taken.push({ left: jobs[0]!.work, finish });
      }),
    clock,
  );
  const flood = (each: Flood): void => {
    const job = { owner: each.owner, model: 'm', key: each.key, images: 1, work: each.batchMs };
    void batcher.submit(job).then(() => flood(each));
  };
  for (const each of floods) for (let n = 0; n < OPEN; n += 1) flood(each);
  for (const pause of pauses) {
    let isOpen = true;
    // Not in step with the batches.
    let idle = pause;
    let since = 0;
    for (let sent = false; isOpen; ) {
      if (!sent && idle <= 0) {
        sent = true;
        since = clock.now();
        const job = { owner: 'rare', model: 'm', key, images: 1, work: 10 };
        void batcher.submit(job).then(() => {
          isOpen = false;
          latencies.push(clock.now() - since);
        });
      }
      const [running] = taken;
      const step = sent ? running!.left : Math.min(running!.left, idle);
      clock.advance(step);
      running!.left -= step;
      idle -= step;
      if (running!.left <= 0) taken.shift()!.finish();
      await settle();
    }
  }
  return latencies;
}

describe('beside a flood of 64 open requests', () => {
  it.each(['same', 'other'])(
    'a request of the %s shape waits for little more than two batches',
    async (key) => {
      const pauses = Array.from({ length: 41 }, (_, n) => (n * 7) % 23);
      const latencies = await simulate([{ owner: 'flood', key: 'same', batchMs: 10 }], key, pauses);
      // Who comes too late for the next batch also waits for the rest of the one that runs.
      expect(Math.max(...latencies)).toBeLessThanOrEqual(20 * (1 + EARLY / 2));
      expect(median(latencies)).toBeLessThanOrEqual(20);
    },
  );

  it('a request waits for the batch that runs, and one of each flood at most, whatever the batches take', async () => {
    const floods = fc.array(
      fc.record({ key: fc.constantFrom('k', 'l', 'rare'), batchMs: fc.integer({ min: 1, max: 30 }) }),
      { minLength: 1, maxLength: 5 },
    );
    const pauses = fc.array(fc.nat(60), { minLength: 1, maxLength: 12 });
    await fc.assert(
      fc.asyncProperty(floods, pauses, async (given, waits) => {
        const all = given.map((each, index) => ({ ...each, owner: `flood ${index}` }));
        const longest = Math.max(...all.map(({ batchMs }) => batchMs), 10);
        const latencies = await simulate(all, 'rare', waits);
        // The running batch, its own, and of each other at most what that is behind in time, rounded up to a batch.
        expect(Math.max(...latencies)).toBeLessThanOrEqual((all.length + 2) * longest);
      }),
      { numRuns: 60 },
    );
  });

  it('a request of many images takes its turns like many requests, and none any more once it is cancelled', async () => {
    const place = comfyPlace(60);
    const stage = await openStage(place, { maxBatch: 2 });
    const [greedy, rare] = [await stage.connect(), await stage.connect()];
    await rare.modelLoad('slow.safetensors');
    const controller = new AbortController();
    const large = greedy.forward(request('slow.safetensors', 100), { signal: controller.signal });
    const latency = await latencyOf(rare, 3, 6);
    expect(latency).toBeLessThan(60 * 4);
    controller.abort();
    await expect(large).rejects.toMatchObject({ code: 'ERR_CANCELLED' });
    const whole = await rare.forward(request('slow.safetensors', 5, 3));
    expect(whole.timing).toMatchObject({ batch: 2, gpuMs: 180 });
    const images = stage.engine.batches.map((batch) => batch.images);
    expect(images.reduce((sum, each) => sum + each, 0)).toBeLessThan(60);
    await stage.end();
    place.remove();
  });

  it('over sockets the median is within 2.2 batches', async () => {
    // Long beside the delays of a busy machine.
    const batchMs = 400;
    const place = comfyPlace(batchMs);
    const stage = await openStage(place, { limits: { maxInFlight: OPEN } });
    const rare = await stage.connect();
    await rare.modelLoad('slow.safetensors');
    const alone = await latencyOf(rare, 5, 4);
    const flood = await openFlood(stage.server.url);
    const same = await latencyOf(rare, 11, 4);
    const other = await latencyOf(rare, 11, 6);
    flood.terminate();
    await stage.end();
    place.remove();
    const inBatches = [alone, same, other].map((ms) => (ms / batchMs).toFixed(2));
    process.stderr.write(
      `  fairness: median latency ${inBatches[0]} batches alone; beside 64 open requests of another connection ${inBatches[1]} (same shape), ${inBatches[2]} (another shape)\n`,
    );
    expect(same / batchMs).toBeLessThan(MOST);
    expect(other / batchMs).toBeLessThan(MOST);
  });
});

async function latencyOf(client: Client, count: number, size: number): Promise<number> {
  const latencies: number[] = [];
  for (let n = 0; n < count; n += 1) {
    const since = performance.now();
    await client.forward(request('slow.safetensors', 1, n, size));
    latencies.push(performance.now() - since);
  }
  return median(latencies);
}

/** A connection that always has 64 requests open. */
async function openFlood(url: string): Promise<WebSocket> {
  const socket = new WebSocket(url, 'unetd.v1');
  await once(socket, 'message');
  const { model, ...tensors } = request('slow.safetensors');
  const views = Object.entries(tensors).map(([name, value]) => ({ name, ...value }));
  let next = 0;
  const send = (): void =>
    socket.send(encodeBinary({ id: String(next++), op: 'forward', model }, views, 'req'));
  socket.on('message', () => {
    if (socket.readyState === WebSocket.OPEN) send();
  });
  for (let n = 0; n < OPEN; n += 1) send();
  return socket;
}
