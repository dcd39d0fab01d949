/**
 * Many LoRAs from eight connections through a pool that holds a tenth of them, on the real server: every result is that of an
 * engine without limits, memory stays flat, and a step that needs no load waits for none. What a pool does inside is
 * test/engine/pool.test.ts and test/lora/.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { StepRequest, TensorData } from '../../src/engine/types.ts';
import type { Client, Message } from '../protocol/client.ts';
import { ASSETS, MODEL, type Server, serve } from '../protocol/server.ts';
import { sendForward, small } from '../protocol/small.ts';
import { encode, errorOf, readTensors, type Tensor } from '../protocol/tensors.ts';
import { SAME } from './catalogue.ts';
import { amount, enginePid, median, mib, report, vitalsOf } from './scale.ts';

const LORAS = amount(200, 40);
const HELD = amount(20, 6);
const CLIENTS = 8;
/** The first half warms up: pages and heaps grow. */
const ROUNDS = amount(12, 3);
const folder = mkdtempSync(join(tmpdir(), 'unetd-pool-'));
const names = Array.from({ length: LORAS }, (_, i) => `lora-${i}.safetensors`);
/** Results of an engine without limits. */
const expected: Tensor[] = [];
let server: Server;
let poolBytes = 0;

/** A LoRA's file with the values of its up matrices turned by some places: as large, and another one. */
function writeVariants(): void {
  const { tensors } = readTensors(`${ASSETS}loras/ink.safetensors`);
  for (const [i, name] of names.entries()) {
    const turned = [...tensors].map(([key, tensor]): [string, Tensor] => {
      if (!key.endsWith('.lora_up.weight')) return [key, tensor];
      const cut = (16 * (i + 1)) % tensor.data.length;
      const data = Buffer.concat([tensor.data.subarray(cut), tensor.data.subarray(0, cut)]);
      return [key, { ...tensor, data }];
    });
    writeFileSync(join(folder, name), encode({}, new Map(turned)));
  }
}

const dense = ({ shape, data }: Tensor): TensorData => ({ dtype: 'F32', shape, data });
const stepWith = (lora: string): StepRequest => ({
  loras: [{ lora, strength: 1 }],
  x: dense(small.get('x')!),
  timesteps: dense(small.get('timesteps')!),
  context: dense(small.get('context')!),
});

beforeAll(async () => {
  writeVariants();
  const engine = await Engine.create();
  await engine.loadModel({ name: MODEL, path: `${ASSETS}models/${MODEL}`, version: '1' }, 'f32');
  for (const name of names) {
    await engine.loadAdapter({ name, path: join(folder, name), version: '1' }, MODEL);
    const [out] = (await engine.forward({ model: MODEL, requests: [stepWith(name)] })).outs;
    expected.push({ dtype: 'F32', shape: out!.shape, data: Buffer.from(out!.data) });
  }
  const [model] = (await engine.stats()).models;
  poolBytes = HELD * model!.adapters[0]!.sizeBytes;
  await engine.close();
  // A quarter of the budget is for adapters.
  server = await serve(
    '--loras',
    folder,
    '--dtype',
    'f32',
    '--memory-budget',
    `${4 * poolBytes}`,
    '--log-level',
    'warn',
  );
});
afterAll(async () => {
  await server?.stop();
  rmSync(folder, { recursive: true });
});

interface Step {
  readonly sent: number;
  readonly got: number;
  readonly gpuMs: number;
}

const latency = ({ sent, got }: Step): number => got - sent;

/** One forward, with the LoRA of a number or without any. */
async function forward(client: Client, i?: number): Promise<Step> {
  const sent = performance.now();
  const loras = i === undefined ? [] : [{ lora: names[i], strength: 1 }];
  const { error, tensors, timing }: Message = await sendForward(client, small, { loras });
  const got = performance.now();
  expect(error).toBeUndefined();
  if (i !== undefined) expect(errorOf(tensors!.get('out'), expected[i]!), names[i]).toBeLessThan(SAME);
  // What the client keeps of past answers is this process's memory.
  client.messages.length = 1;
  client.sent.clear();
  return { sent, got, gpuMs: timing!.gpuMs };
}

/** Lets the engine compile what it runs for batches of every size, which takes longer than any load: one runs, others wait. */
async function compileAll(clients: readonly Client[]): Promise<void> {
  for (let size = 1; size <= clients.length; size++)
    for (const lora of [undefined, 0]) {
      const first = forward(clients[0]!, lora);
      await Promise.all([first, ...clients.slice(0, size).map((client) => forward(client, lora))]);
    }
}

/** Every LoRA twice in a row, dealt out to the clients: first it may have to be read. */
async function cycle(clients: readonly Client[], round: number): Promise<readonly Step[]> {
  const steps = clients.map(async (client, c) => {
    const own: Step[] = [];
    for (let at = c; at < LORAS; at += clients.length) {
      const i = (at * 77 + round) % LORAS;
      own.push(await forward(client, i), await forward(client, i));
    }
    return own;
  });
  return (await Promise.all(steps)).flat();
}

/** What `work` gives while `others` step without a LoRA, and their steps. */
async function beside<T>(
  others: readonly Client[],
  work: () => Promise<T>,
): Promise<readonly [T, readonly Step[]]> {
  let isOver = false;
  const around: Step[] = [];
  const stepping = others.map(async (other) => {
    while (!isOver) around.push(await forward(other));
  });
  const result = await work();
  isOver = true;
  await Promise.all(stepping);
  return [result, around];
}

/** So many steps without a LoRA, beside those of `others`: what waits are like on this machine where nothing is loaded. */
async function stepsBeside(
  client: Client,
  others: readonly Client[],
  count: number,
): Promise<readonly number[]> {
  const [own, around] = await beside(others, async () => {
    const steps: Step[] = [];
    while (steps.length < count) steps.push(await forward(client));
    return steps;
  });
  return stallsOf(own, around);
}

/** Of the time that each step waited, what no batch ran in. */
const stallsOf = (steps: readonly Step[], around: readonly Step[]): readonly number[] =>
  steps.map((step) => stallMs(step, [...steps, ...around]));

/** A batch ran for its `gpuMs` before its answers came. */
function stallMs({ sent, got }: Step, all: readonly Step[]): number {
  const runs = all
    .map((step) => [Math.max(sent, step.got - step.gpuMs), Math.min(got, step.got)] as const)
    .filter(([from, to]) => from < to)
    .sort(([a], [b]) => a - b);
  let idle = 0;
  let until = sent;
  for (const [from, to] of runs) {
    idle += Math.max(0, from - until);
    until = Math.max(until, to);
  }
  return idle + got - until;
}

/**
 * How long one load takes, with nobody else there or while `others` step without a LoRA: a step that has to read one, less the
 * next, which has not.
 */
async function singleLoads(
  client: Client,
  others: readonly Client[],
  first: number,
): Promise<readonly number[]> {
  const [loads] = await beside(others, async () => {
    const times: number[] = [];
    for (let i = first; i < LORAS; i += LORAS / 20) {
      const [cold, warm] = [await forward(client, i), await forward(client, i)];
      times.push(latency(cold) - latency(warm));
    }
    return times;
  });
  return loads;
}

const quantile = (values: readonly number[], q: number): number =>
  [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) * q)]!;
const spread = (values: readonly number[]): string =>
  [0.5, 0.95, 1].map((q) => quantile(values, q).toFixed(0)).join(' / ');

interface Look {
  readonly front: number;
  readonly engine: number;
  readonly gpu: number;
}

/** The bytes that it takes now; checks what the pool says of itself after so many rounds. */
async function look(client: Client, engine: number, rounds: number): Promise<Look> {
  const { memory, turnover, models } = (await client.ask('stats')).result.engine;
  expect(memory.adapterBudgetBytes).toBe(poolBytes);
  expect(memory.adapterBytes).toBeLessThanOrEqual(poolBytes);
  expect(models[0].adapters.length).toBeLessThanOrEqual(HELD);
  expect(turnover.adapterEvictions).toBeGreaterThan(rounds * (LORAS - 2 * HELD));
  const [front, child] = [server.pid, engine].map((pid) => vitalsOf(pid).rssBytes);
  const gpu = memory.weightBytes + memory.adapterBytes + memory.arenaBytes;
  return { front: front!, engine: child!, gpu };
}

/** The last quarter of the rounds against the one before. The short run is all warm-up. */
function expectFlat(looks: readonly Look[]): void {
  for (const of of ['front', 'engine', 'gpu'] as const) {
    const each = looks.map((found) => found[of]);
    report(`pool: memory of the ${of} after each round ${each.map(mib).join(', ')}`);
    const [warm, late] = [each.slice(ROUNDS / 2, (3 * ROUNDS) / 4), each.slice((3 * ROUNDS) / 4)].map(median);
    // Tables and scratch are as large as the largest batch so far needed them.
    expect(late! / warm!, of).toBeLessThan(of === 'gpu' ? 1.005 : amount(1.05, 1.5));
  }
}

test(`${LORAS} LoRAs go through room for ${HELD} under load from ${CLIENTS} connections`, async () => {
  for (const [i, out] of expected.entries())
    for (const other of expected.slice(i + 1))
      expect(errorOf(out, other), names[i]).toBeGreaterThan(20 * SAME);
  const clients = await Promise.all(Array.from({ length: CLIENTS }, () => server.open()));
  const steady = await server.open();
  await compileAll([...clients, steady]);
  const engine = enginePid(server.pid)!;
  const looks: Look[] = [];
  const cycled: Step[] = [];
  const beside: Step[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    let isOver = false;
    const cycling = cycle(clients, round).finally(() => {
      isOver = true;
    });
    const own: Step[] = [];
    while (!isOver) own.push(await forward(steady));
    const others = await cycling;
    if (round > 0) {
      beside.push(...own);
      cycled.push(...others);
    }
    looks.push(await look(steady, engine, round + 1));
  }
  const alone = await singleLoads(steady, [], 0);
  const loads = await singleLoads(steady, clients, 1);
  const stalls = stallsOf(beside, cycled);
  const usual = await stepsBeside(steady, clients, beside.length);
  report('pool: in ms, median / of 95 % / longest');
  report(`pool: one load, alone ${spread(alone)}, beside ${CLIENTS} that step ${spread(loads)}`);
  report(`pool: ${cycled.length} steps with a LoRA, half of them to be read, ${spread(cycled.map(latency))}`);
  report(`pool: ${beside.length} steps without one meanwhile ${spread(beside.map(latency))}`);
  const [here, there] = [stalls, usual].map(spread);
  report(`pool: of it while no batch ran ${here}, and of as many while nothing was loaded ${there}`);
  expectFlat(looks);
  expect(median(stalls)).toBeLessThan(median(loads));
  // A machine that does other work too makes steps wait as it likes: the longest wait is compared with its own. The short run
  // has too few steps for that.
  const q = amount(1, 0.95);
  expect(quantile(stalls, q) - quantile(usual, q)).toBeLessThan(Math.max(...loads));
  const { errors, restarts } = (await steady.ask('stats')).result;
  expect({ errors, restarts }).toEqual({ errors: {}, restarts: 0 });
  for (const client of [...clients, steady]) expect(await client.finish()).toEqual([]);
});
