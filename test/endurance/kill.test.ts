/**
 * The engine process killed at random moments under load: every request is answered once, rightly. The serving process killed:
 * clients connect again and finish.
 */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type ClientTensor, floatsOf, tensorFrom } from '../../src/client.ts';
import type { LoraUse } from '../../src/engine/types.ts';
import { FailoverClient } from '../../src/failover.ts';
import type { Client } from '../protocol/client.ts';
import { type Server, serve } from '../protocol/server.ts';
import { errorOf, type Tensor, valuesOf } from '../protocol/tensors.ts';
import { faultOf, type Known, SAME, serveKnown } from './catalogue.ts';
import { amount, below, enginePid, median, pause, pick, randomFrom, report, seedOf } from './scale.ts';

const KILLS = amount(50, 3);
const FRONT_KILLS = amount(5, 1);
const CONNECTIONS = 8;
const OPEN = 3;

let server: Server;
let known: readonly Known[];

beforeAll(async () => {
  ({ server, known } = await serveKnown(12));
});
afterAll(() => server?.stop());

test(`the engine killed at ${KILLS} random moments costs no request its answer`, async () => {
  const random = randomFrom(seedOf('kill'));
  let isOver = false;
  let answered = 0;
  /** Grows with every answer of a request that was sent after the last kill. */
  let fresh = 0;
  let kills = 0;
  const clients = await Promise.all(Array.from({ length: CONNECTIONS }, () => server.open()));
  const work = async (client: Client): Promise<void> => {
    while (!isOver) {
      const one = pick(random, known);
      const before = kills;
      const fault = faultOf(await client.send('forward', one.fields, one.tensors), one);
      expect(fault, `after ${kills} kills`).toBeNull();
      answered += 1;
      if (before === kills) fresh += 1;
    }
  };
  const kill = async (): Promise<number[]> => {
    const outages: number[] = [];
    for (let pid = enginePid(server.pid); kills < KILLS; pid = enginePid(server.pid)) {
      await pause(below(random, 400));
      const killedAt = performance.now();
      fresh = 0;
      kills += 1;
      process.kill(pid!, 'SIGKILL');
      // All that was open then has been answered when each connection has had new ones answered.
      while (fresh < CONNECTIONS * OPEN * 2) await pause(10);
      outages.push(performance.now() - killedAt);
    }
    return outages;
  };
  const workers = Promise.all(clients.flatMap((client) => Array.from({ length: OPEN }, () => work(client))));
  const killing = kill().finally(() => {
    isOver = true;
  });
  const [outages] = await Promise.all([killing, workers]);
  for (const client of clients) expect(await client.finish()).toEqual([]);
  report(
    `kill: ${answered} requests through ${kills} kills, all answered once and rightly; ${median(outages).toFixed(0)} ms until work went on`,
  );
  const client = await server.open();
  const { restarts, forwards } = (await client.ask('stats')).result;
  expect(restarts).toBe(KILLS);
  expect(forwards.failed).toBe(0);
  await client.close();
});

test('clients of a server that is killed connect to the next and finish', async () => {
  const random = randomFrom(seedOf('front'));
  const port = new URL(server.url).port;
  const clients = Array.from({ length: 4 }, () => new FailoverClient([server.url], { patienceMs: 120_000 }));
  let isOver = false;
  let answered = 0;
  const work = async (client: FailoverClient): Promise<void> => {
    while (!isOver) {
      const one = pick(random, known);
      const tensor = (name: string): ClientTensor => {
        const given = one.tensors.get(name)!;
        return tensorFrom(valuesOf(given), given.shape, 'F32');
      };
      const { out } = await client.forward({
        ...(one.fields as { readonly model: string; readonly loras: readonly LoraUse[] }),
        ...{ x: tensor('x'), timesteps: tensor('timesteps'), context: tensor('context') },
      });
      const actual: Tensor = { dtype: 'F32', shape: out.shape, data: new Uint8Array(floatsOf(out).buffer) };
      expect(errorOf(actual, one.out)).toBeLessThan(SAME);
      answered += 1;
    }
  };
  const kill = async (): Promise<void> => {
    for (let n = 0; n < FRONT_KILLS; n += 1) {
      const before = answered;
      while (answered < before + 8) await pause(10);
      await pause(below(random, 200));
      process.kill(server.pid, 'SIGKILL');
      await pause(100);
      server = await serve('--dtype', 'f32', '--log-level', 'warn', '--port', port);
    }
    const before = answered;
    while (answered < before + 8) await pause(10);
  };
  const killing = kill().finally(() => {
    isOver = true;
  });
  await Promise.all([killing, ...clients.map(work)]);
  const resent = clients.reduce((sum, client) => sum + client.resent, 0);
  report(`kill: ${answered} requests through ${FRONT_KILLS} ends of the server, ${resent} sent again`);
  for (const client of clients) await client.close();
  expect(resent).toBeGreaterThan(0);
});
