/** A client of several servers when an engine cannot be started for a while: it goes elsewhere, or waits, and takes no poison along. */
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type Client, floatsOf } from '../../src/client.ts';
import { EngineProcess } from '../../src/engine/process.ts';
import { FailoverClient, type FailoverOptions } from '../../src/failover.ts';
import { comfyPlace, openStage, type Place, request, type Stage } from './setting.ts';
import { type StandInEngine, standInResult, TROUBLE } from './stand-in-engine.ts';

const MODEL = 'fast.safetensors';
const STAND_IN = new URL('./stand-in-engine.ts', import.meta.url).href;

let place: Place;
let engine: EngineProcess;
let down: Stage;
let sound: Stage;
const clients: FailoverClient[] = [];

beforeEach(async () => {
  place = comfyPlace();
  const flaky = `import { existsSync } from 'node:fs';
    import { StandInEngine } from ${JSON.stringify(STAND_IN)};
    export const Engine = { create: () => {
      if (existsSync(${JSON.stringify(join(place.dir, 'broken'))})) throw new Error('the driver is gone');
      return StandInEngine.create();
    } };`;
  place.write('flaky.mjs', Buffer.from(flaky));
  engine = await EngineProcess.start({ module: `file://${join(place.dir, 'flaky.mjs')}`, backoffMs: 250 });
  down = await openStage(place, {}, engine as unknown as StandInEngine);
  sound = await openStage(place);
});

afterEach(async () => {
  for (const client of clients.splice(0)) await client.close();
  for (const stage of [down, sound]) await stage.end();
  await engine.close();
  place.remove();
});

function clientOf(stages: readonly Stage[], options: FailoverOptions = {}): FailoverClient {
  const client = new FailoverClient(
    stages.map(({ server }) => server.url),
    options,
  );
  clients.push(client);
  return client;
}

async function forward(client: FailoverClient, seed: number): Promise<void> {
  const sent = request(MODEL, 1, seed);
  const { out } = await client.forward(sent);
  expect(floatsOf(out)).toEqual(floatsOf(standInResult({ loras: [], ...sent }, new Map())));
}

/** From now on the engine of the first server ends whenever it starts. Gives a connection that stays there. */
async function outage(): Promise<Client> {
  place.write('broken', Buffer.of());
  process.kill(engine.pid!, 'SIGKILL');
  const witness = await down.connect();
  // Waits until the first attempt to start it has failed.
  await expect(witness.modelLoad('slow.safetensors')).rejects.toMatchObject({
    code: 'ERR_ENGINE_DOWN',
    details: { retryAfterMs: expect.any(Number) },
  });
  return witness;
}

const mend = (): void => rmSync(join(place.dir, 'broken'));

describe('a client of several servers', () => {
  it('takes its requests to another one while an engine cannot be started', async () => {
    const client = clientOf([down, sound]);
    await forward(client, 0);
    expect(sound.engine.batches).toHaveLength(0);
    const witness = await outage();
    await Promise.all([1, 2, 3, 4].map((seed) => forward(client, seed)));
    expect(engine.alive).toBe(false);
    expect(client.resent).toBe(4);
    await expect.poll(async () => (await witness.stats()).connections).toBe(1);
  });

  it('does so when it connects too, where something is done on every new connection', async () => {
    await outage();
    const prepare: FailoverOptions['prepare'] = async (server) => void (await server.modelLoad(MODEL));
    await forward(clientOf([down, sound], { prepare }), 1);
    expect(engine.alive).toBe(false);
  });

  it('waits for the engine where there is no other server, as long as it has patience', async () => {
    await outage();
    await expect(clientOf([down], { patienceMs: 100 }).forward(request(MODEL))).rejects.toMatchObject({
      code: 'ERR_ENGINE_DOWN',
      message: expect.stringContaining('the driver is gone'),
    });
    const answer = forward(clientOf([down]), 2);
    await sleep(200);
    mend();
    await answer;
    expect(engine.restarts).toBe(1);
  });

  it('stops waiting when it is told to', async () => {
    await outage();
    const controller = new AbortController();
    const open = clientOf([down]).forward(request(MODEL), { signal: controller.signal });
    setTimeout(() => controller.abort(), 50);
    await expect(open).rejects.toMatchObject({ code: 'ERR_CANCELLED' });
  });

  it('does not take a request that ends engines to the next one', async () => {
    const client = clientOf([down, sound]);
    const poison = request(MODEL);
    new DataView(poison.context.data.buffer).setFloat32(0, TROUBLE.crash, true);
    await expect(client.forward(poison)).rejects.toMatchObject({
      code: 'ERR_ENGINE_DOWN',
      message: expect.stringContaining('it is not run again'),
    });
    expect(client.resent).toBe(0);
    expect(sound.engine.loads).toEqual([]);
  });
});
