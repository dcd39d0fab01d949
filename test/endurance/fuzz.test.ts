/**
 * Random, mutated, lying, fragmented, oversized and slow frames at a running server with the real engine: it goes on, answers each
 * message once, never with another's answer, loses no memory, and serves a well-behaved client beside them as if they were not there.
 */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { WebSocket } from 'ws';
import type { Client, Message } from '../protocol/client.ts';
import { type Server, serve } from '../protocol/server.ts';
import { decode } from '../protocol/tensors.ts';
import { type BadFrame, badFrame, goodFrame } from './bad-frames.ts';
import { faultOf, type Known, openCatalogue } from './catalogue.ts';
import { abandon, crawl, violate } from './raw.ts';
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

const FRAMES = amount(200_000, 2000);
const LANES = 6;
/** Messages sent at once on a connection; fewer than its window. */
const VOLLEY = 16;
/** Volleys before a connection is given up for another. */
const VOLLEYS = 40;
/** Share of right forwards among the others, whose answers are checked. */
const GOOD = 0.02;
const PATIENCE_MS = 90_000;

let server: Server;
let watcher: Client;
let known: readonly Known[];

beforeAll(async () => {
  server = await serve('--dtype', 'f32', '--log-level', 'warn', '--upload-quota', '64MB');
  watcher = await server.open();
  known = await openCatalogue(watcher, 12);
});
afterAll(() => server?.stop());

interface Sent {
  readonly id: string;
  readonly bytes: BadFrame;
  readonly kind: string;
  /** What the answer must be, where the message is right. */
  readonly known?: Known;
}

function readAnswer(data: Buffer, isBinary: boolean): Message {
  if (!isBinary) return JSON.parse(data.toString('utf8')) as Message;
  const file = decode(data);
  return { ...(JSON.parse(file.metadata.res!) as Message), tensors: file.tensors };
}

/** Null, or why no message of the volley can have been meant by the answer. */
function strayFault(answer: Message, volley: readonly Sent[]): string | null {
  const { id } = answer;
  if (id === null || id === undefined)
    return answer.error === undefined ? 'an answer without id or error' : null;
  const sent = volley.find((each) => each.id === id);
  if (sent?.known !== undefined) {
    const fault = faultOf(answer, sent.known);
    return fault === null ? null : `a right forward got ${fault}`;
  }
  // The id may have been mutated with the rest; somebody must have sent it all the same.
  const text = JSON.stringify(id).slice(1, -1);
  const isSent = volley.some(({ bytes }) => bytes.includes(text) || bytes.includes(id));
  return sent !== undefined || isSent || /[\ufffd\\]/.test(text) ? null : `nobody sent the id ${text}`;
}

function send(socket: WebSocket, bytes: BadFrame, random: Random): void {
  const whole = Buffer.from(bytes);
  const binary = typeof bytes !== 'string';
  if (random() < 0.8 || whole.length < 2) {
    socket.send(whole, { binary });
    return;
  }
  const cut = 1 + below(random, whole.length - 1);
  socket.send(whole.subarray(0, cut), { binary, fin: false });
  if (random() < 0.3) socket.ping();
  socket.send(whole.subarray(cut), { fin: true });
}

/** One connection that sends volleys and counts their answers. */
async function lane(random: Random, take: () => string | null, tally: Map<string, number>): Promise<void> {
  const socket = new WebSocket(server.url, 'unetd.v1', { maxPayload: 2 ** 30 });
  const answers: Message[] = [];
  let ended: number | null = null;
  let wake = (): void => {};
  socket.on('message', (data: Buffer, isBinary) => {
    const answer = readAnswer(data, isBinary);
    if (answer.event === undefined) answers.push(answer);
    wake();
  });
  socket.on('close', (code) => {
    ended = code;
    wake();
  });
  await new Promise((resolve, reject) => socket.on('open', resolve).on('error', reject));
  for (let round = 0; round < VOLLEYS; round += 1) {
    const volley: Sent[] = [];
    for (let id = take(); id !== null; id = take()) {
      const known_ = pick(random, known);
      const isGood = random() < GOOD;
      const { kind, bytes } = isGood
        ? { kind: 'right forward', bytes: goodFrame(id, known_) }
        : badFrame(random, id, known_);
      volley.push({ id, kind, bytes, ...(isGood ? { known: known_ } : {}) });
      if (volley.length === VOLLEY) break;
    }
    if (volley.length === 0) break;
    answers.length = 0;
    for (const { bytes, kind } of volley) {
      tally.set(kind, (tally.get(kind) ?? 0) + 1);
      send(socket, bytes, random);
    }
    const deadline = performance.now() + PATIENCE_MS;
    while (answers.length < volley.length && ended === null && performance.now() < deadline) {
      await new Promise<void>((resolve) => {
        wake = resolve;
        setTimeout(resolve, 1000);
      });
    }
    const kinds = JSON.stringify(volley.map(({ kind, id }) => `${id} ${kind}`));
    expect(ended, `the connection was closed; ${kinds}`).toBeNull();
    expect(answers.length, `answers to ${kinds}`).toBe(volley.length);
    for (const answer of answers) expect(strayFault(answer, volley), kinds).toBeNull();
    for (const { id, known: right } of volley) {
      const count = answers.filter((answer) => answer.id === id).length;
      expect(count, `answers to ${id}`).toBeLessThanOrEqual(1);
      if (right !== undefined) expect(count, `answers to the right forward ${id}`).toBe(1);
    }
  }
  // Some go without saying so, with nothing open; some in the middle of a volley.
  if (random() < 0.5) {
    socket.send(goodFrame('last', known[0]!));
    await pause(below(random, 5));
    socket.terminate();
  } else socket.close();
}

test(`a server outlives ${FRAMES} bad frames and serves its other clients throughout`, async () => {
  const seed = seedOf('fuzz');
  const tally = new Map<string, number>();
  let left = FRAMES;
  let isOver = false;
  const take = (): string | null => (left > 0 ? `f${left--}` : null);
  const engine = enginePid(server.pid)!;
  const samples: { done: number; front: number; engine: number }[] = [];
  const started = performance.now();

  const behave = async (): Promise<{ right: number; slowestMs: number }> => {
    let right = 0;
    let slowestMs = 0;
    for (; !isOver; right += 1) {
      const one = known[right % known.length]!;
      const since = performance.now();
      const fault = faultOf(await watcher.send('forward', one.fields, one.tensors), one);
      expect(fault, `well-behaved forward ${right}`).toBeNull();
      slowestMs = Math.max(slowestMs, performance.now() - since);
      watcher.messages.length = 1;
      await pause(20);
    }
    return { right, slowestMs };
  };
  const lanes = Array.from({ length: LANES }, async (_, index) => {
    const random = randomFrom(seed + index);
    while (left > 0) await lane(random, take, tally);
  });
  const raw = async (): Promise<void> => {
    const random = randomFrom(seed + LANES);
    const many = amount(2000, 40);
    for (let n = 0; n < many && !isOver; n += 1) {
      const what = pick(random, ['violation', 'violation', 'abandoned', 'slow']);
      if (what === 'violation') await violate(server.url, random);
      else if (what === 'abandoned') await abandon(server.url, random);
      else expect(await crawl(server.url, random)).toContain('ok":true');
      tally.set(what, (tally.get(what) ?? 0) + 1);
    }
  };
  const sample = async (): Promise<void> => {
    while (!isOver) {
      samples.push({
        done: FRAMES - left,
        front: vitalsOf(server.pid).rssBytes,
        engine: vitalsOf(engine).rssBytes,
      });
      await pause(250);
    }
  };
  const all = Promise.all(lanes).finally(() => {
    isOver = true;
  });
  const [{ right, slowestMs }] = await Promise.all([behave(), all, raw(), sample()]);
  const seconds = (performance.now() - started) / 1000;

  report(`fuzz: ${[...tally].map(([kind, count]) => `${count} ${kind}`).join(', ')}`);
  report(
    `fuzz: ${FRAMES} frames in ${seconds.toFixed(0)} s; beside them ${right} right forwards, slowest ${slowestMs.toFixed(0)} ms`,
  );
  expect(right).toBeGreaterThan(5);

  // One frame a little over the limit is answered; this is slow, so it comes once.
  await oversized();
  await expectQuiet(engine);
  const growth = (of: 'front' | 'engine'): number => {
    const warm = samples
      .filter(({ done }) => done > FRAMES * 0.2 && done <= FRAMES * 0.4)
      .map((each) => each[of]);
    const late = samples.filter(({ done }) => done > FRAMES * 0.8).map((each) => each[of]);
    report(`fuzz: memory of the ${of} ${mib(median(warm))} after warm-up, ${mib(median(late))} at the end`);
    return median(late) - median(warm);
  };
  const [front, behind] = [growth('front'), growth('engine')];
  // The short run is all warm-up: the heaps still grow to what they need.
  const room = amount(24, 96) * 1024 ** 2;
  expect(front).toBeLessThan(room);
  expect(behind).toBeLessThan(room);
});

async function oversized(): Promise<void> {
  const limit = watcher.hello.limits!.maxMessageBytes;
  const client = await server.open();
  const answer = await client.complain(Buffer.alloc(limit + 1));
  expect(answer.error?.code).toBe('ERR_TOO_LARGE');
  expect(await client.finish()).toEqual([]);
}

/** Nothing is left of those who have gone, and nothing in the server failed. */
async function expectQuiet(engine: number): Promise<void> {
  await expect
    .poll(
      async () => {
        const { result } = await watcher.ask('stats');
        const { connections, queue, kept, restarts } = result;
        return { connections, requests: queue.requests, running: queue.running, kept: kept.bytes, restarts };
      },
      { timeout: 20_000 },
    )
    .toEqual({ connections: 1, requests: 0, running: 0, kept: 0, restarts: 0 });
  const { errors } = (await watcher.ask('stats')).result;
  for (const code of ['ERR_INTERNAL', 'ERR_GPU', 'ERR_ENGINE_DOWN', 'ERR_DEVICE_LOST']) {
    expect(errors, server.log().slice(-3000)).not.toHaveProperty(code);
  }
  expect(enginePid(server.pid)).toBe(engine);
  expect(server.log()).not.toMatch(/[Uu]nhandled|uncaught/);
  // Standard streams, the port, the channel to the engine, one client, and what node itself needs.
  expect(vitalsOf(server.pid).files).toBeLessThan(60);
}
