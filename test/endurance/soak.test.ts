/**
 * Thousands of forwards of the demo model from many connections with random LoRAs, some cancelled, some cut off, some wrong: every
 * answer is the right one or a clear error, memory stays flat, nothing fails unheard.
 */
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { Client, Fields, Message } from '../protocol/client.ts';
import type { Server } from '../protocol/server.ts';
import { faultOf, type Known, serveKnown } from './catalogue.ts';
import {
  amount,
  below,
  enginePid,
  median,
  mib,
  pause,
  pick,
  type Random,
  randomFrom,
  report,
  seedOf,
  vitalsOf,
} from './scale.ts';

const FORWARDS = amount(20_000, 300);
const CONNECTIONS = 32;
/** Requests that a connection sends at once. */
const BURST = 4;
/** Share of forwards that are cancelled, that are wrong, and after how many bursts a connection is cut, on average. */
const CANCELLED = 0.05;
const WRONG = 0.03;
const CUT = 0.04;
const WRONGS: readonly { readonly fields: Fields; readonly code: string }[] = [
  { fields: { loras: [{ lora: 'none.safetensors', strength: 1 }] }, code: 'ERR_UNKNOWN_LORA' },
  { fields: { loras: [{ lora: 'ink.safetensors' }] }, code: 'ERR_BAD_STRENGTH' },
  { fields: { model: 'none.safetensors' }, code: 'ERR_UNKNOWN_MODEL' },
  { fields: { reuse: { y: 'never kept' } }, code: 'ERR_NOT_KEPT' },
  { fields: { keep: { z: 'key' } }, code: 'ERR_BAD_REQUEST' },
];

let server: Server;
let known: readonly Known[];

beforeAll(async () => {
  ({ server, known } = await serveKnown(24));
});
afterAll(() => server?.stop());

class Tally {
  left = FORWARDS;
  right = 0;
  cancelled = 0;
  refused = 0;
  cut = 0;

  take(): boolean {
    this.left -= 1;
    return this.left >= 0;
  }
}

/** The same promise, of which somebody will look at a rejection later. */
function heard<Value>(promise: Promise<Value>): Promise<Value> {
  promise.catch(() => {});
  return promise;
}

/** One forward of a burst; what is wrong with its answer is thrown. */
async function forward(client: Client, random: Random, tally: Tally): Promise<void> {
  const one = pick(random, known);
  if (random() < WRONG) {
    const { fields, code } = pick(random, WRONGS);
    const answer = await client.send('forward', { ...one.fields, ...fields }, one.tensors);
    expect(answer.error?.code).toBe(code);
    tally.refused += 1;
    return;
  }
  const isCancelled = random() < CANCELLED;
  const sent = heard(client.send('forward', one.fields, one.tensors));
  // Its id is the one given last.
  const target = [...client.sent].at(-1)!;
  let cancel: Promise<Message> | undefined;
  if (isCancelled) {
    await pause(below(random, 30));
    cancel = heard(client.ask('cancel', { target }));
  }
  const answer = await sent;
  await cancel;
  if (isCancelled && answer.error?.code === 'ERR_CANCELLED') tally.cancelled += 1;
  else {
    expect(faultOf(answer, one)).toBeNull();
    tally.right += 1;
  }
}

async function connection(random: Random, tally: Tally): Promise<void> {
  let client = await server.open();
  while (tally.left > 0) {
    const count = 1 + below(random, BURST);
    const burst: Promise<void>[] = [];
    for (let n = 0; n < count && tally.take(); n += 1) burst.push(heard(forward(client, random, tally)));
    if (random() >= CUT) {
      await Promise.all(burst);
      // What the client keeps of past answers is not the server's memory, but this process's.
      client.messages.length = 1;
      client.sent.clear();
      continue;
    }
    // Goes away with its requests open: they are answered to nobody, and asked again by nobody.
    await pause(below(random, 20));
    client.socket.terminate();
    const ends = await Promise.allSettled(burst);
    tally.cut += ends.filter(({ status }) => status === 'rejected').length;
    for (const end of ends)
      if (end.status === 'rejected') expect(String(end.reason)).toContain('closed with');
    client = await server.open();
  }
  expect(await client.finish()).toEqual([]);
}

interface Sample {
  readonly done: number;
  readonly front: number;
  readonly engine: number;
}

test(`${FORWARDS} forwards from ${CONNECTIONS} connections are answered rightly, in memory that stays flat`, async () => {
  const seed = seedOf('soak');
  const tally = new Tally();
  const engine = enginePid(server.pid)!;
  const samples: Sample[] = [];
  const started = performance.now();
  let isOver = false;
  const sample = async (): Promise<void> => {
    while (!isOver) {
      const done = FORWARDS - tally.left;
      samples.push({ done, front: vitalsOf(server.pid).rssBytes, engine: vitalsOf(engine).rssBytes });
      await pause(200);
    }
  };
  const all = Promise.all(
    Array.from({ length: CONNECTIONS }, (_, index) => connection(randomFrom(seed + index), tally)),
  ).finally(() => {
    isOver = true;
  });
  await Promise.all([all, sample()]);

  const seconds = (performance.now() - started) / 1000;
  const { right, cancelled, refused, cut } = tally;
  report(
    `soak: ${right} right, ${cancelled} cancelled, ${refused} refused, ${cut} cut off, in ${seconds.toFixed(0)} s`,
  );
  expect(right + cancelled + refused + cut).toBe(FORWARDS);
  expect(right).toBeGreaterThan(FORWARDS * 0.8);
  await expectQuiet(engine);
  expectFlat(samples);
});

/** Nothing is left of those who have gone, and nothing in the server or on the GPU failed. */
async function expectQuiet(engine: number): Promise<void> {
  const client = await server.open();
  const { queue, kept, restarts, errors, connections, forwards } = (await client.ask('stats')).result;
  report(`soak: ${forwards.batches} batches of ${forwards.meanBatchRequests.toFixed(2)} requests on average`);
  expect({ requests: queue.requests, running: queue.running, kept: kept.bytes, connections }).toEqual({
    requests: 0,
    running: 0,
    kept: 0,
    connections: 1,
  });
  expect(restarts).toBe(0);
  expect(enginePid(server.pid)).toBe(engine);
  for (const code of ['ERR_INTERNAL', 'ERR_GPU', 'ERR_ENGINE_DOWN', 'ERR_DEVICE_LOST', 'ERR_OUT_OF_MEMORY'])
    expect(errors, server.log().slice(-3000)).not.toHaveProperty(code);
  expect(server.log()).not.toMatch(/[Uu]nhandled|[Uu]ncaught/);
  await client.close();
}

/** The last quarter against the quarter after the warm-up, which is half the run. The short run is all warm-up: it only reports. */
function expectFlat(samples: readonly Sample[]): void {
  for (const of of ['front', 'engine'] as const) {
    const within = (from: number, to: number): number =>
      median(
        samples.filter(({ done }) => done >= from * FORWARDS && done < to * FORWARDS).map((each) => each[of]),
      );
    const [warm, late] = [within(0.5, 0.75), within(0.75, 1.01)];
    const share = late / warm - 1;
    report(
      `soak: memory of the ${of} ${mib(warm)}, then ${mib(late)}: ${share < 0 ? '' : '+'}${(share * 100).toFixed(2)} %`,
    );
    expect(share).toBeLessThan(amount(0.02, 0.5));
  }
}
