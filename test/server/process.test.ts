/** The engine in a process of its own: what callers notice when it dies, which should be as little as possible. */
import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { floatsOf } from '../../src/client.ts';
import { EngineProcess } from '../../src/engine/process.ts';
import type { FileSource, StepRequest } from '../../src/engine/types.ts';
import { comfyPlace, filled, makePlace, modelFile, openStage, type Place, request } from './setting.ts';
import { type StandInEngine, standInResult, TROUBLE } from './stand-in-engine.ts';

const MODULE = new URL('./stand-in-engine.ts', import.meta.url).href;

let place: Place;
let engine: EngineProcess;
let lines: string[];

beforeEach(async () => {
  place = comfyPlace(30);
  lines = [];
  engine = await EngineProcess.start({ module: MODULE, backoffMs: 10, log: (line) => lines.push(line) });
});

afterEach(async () => {
  await engine.close();
  place.remove();
});

const source = (name: string): FileSource => ({
  name,
  path: join(place.dir, name.includes('double') ? 'loras' : 'checkpoints', name),
  version: '1',
});

function step(seed: number, trouble?: number): StepRequest {
  const context = filled([1, 3, 6], seed);
  if (trouble !== undefined) new DataView(context.data.buffer).setFloat32(0, trouble, true);
  return {
    loras: [{ lora: 'double.safetensors', strength: seed }],
    x: filled([1, 4, 2, 2], seed),
    timesteps: filled([1], seed),
    context,
  };
}

const SLOW = 'slow.safetensors';
const factors = new Map([['double.safetensors', 1]]);
const kill = (): void => {
  if (engine.pid !== undefined) process.kill(engine.pid, 'SIGKILL');
};

async function prepare(): Promise<void> {
  await engine.loadModel(source(SLOW), 'f32');
  await engine.loadAdapter(source('double.safetensors'), SLOW);
}

describe('the engine process', () => {
  it('does what the engine does, progress and errors included', async () => {
    expect(engine.device.name).toBe('stand-in');
    const seen: number[] = [];
    const info = await engine.loadModel(source(SLOW), 'f32', (_stage, done) => seen.push(done));
    expect(info).toMatchObject({ model: SLOW, dtype: 'f32' });
    expect(seen).toEqual([0, 1, 2, 3]);
    await engine.loadAdapter(source('double.safetensors'), SLOW);
    const { outs } = await engine.forward({ model: SLOW, requests: [step(1), step(2)] });
    expect(outs.map(floatsOf)).toEqual(
      [step(1), step(2)].map((each) => floatsOf(standInResult(each, factors))),
    );
    expect(await engine.stats()).toMatchObject({ images: 2 });
    await expect(engine.forward({ model: 'none', requests: [step(1)] })).rejects.toMatchObject({
      code: 'ERR_MODEL_NOT_LOADED',
    });
    await engine.unloadModel(SLOW);
    await expect(engine.unloadModel(SLOW)).rejects.toMatchObject({ code: 'ERR_MODEL_NOT_LOADED' });
  });

  it('answers every call under load although it is killed again and again', async () => {
    await prepare();
    const calls = Array.from({ length: 12 }, async (_, seed) => {
      await sleep(seed * 40);
      const { outs } = await engine.forward({ model: SLOW, requests: [step(seed)] });
      expect(floatsOf(outs[0]!)).toEqual(floatsOf(standInResult(step(seed), factors)));
    });
    await sleep(100);
    kill();
    await Promise.all(calls);
    expect(engine.restarts).toBe(1);
    kill();
    await sleep(20);
    const { outs } = await engine.forward({ model: SLOW, requests: [step(3)] });
    expect(floatsOf(outs[0]!)).toEqual(floatsOf(standInResult(step(3), factors)));
    expect(engine.restarts).toBe(2);
    expect(engine.alive).toBe(true);
    expect(lines.some((line) => line.includes('SIGKILL'))).toBe(true);
  });

  it.each([TROUBLE.crash, TROUBLE.deviceLost])(
    'gives up on a request that ends it twice (%d), and goes on',
    async (trouble) => {
      await prepare();
      await expect(engine.forward({ model: SLOW, requests: [step(1, trouble)] })).rejects.toMatchObject({
        code: 'ERR_ENGINE_DOWN',
      });
      const { outs } = await engine.forward({ model: SLOW, requests: [step(2)] });
      expect(floatsOf(outs[0]!)).toEqual(floatsOf(standInResult(step(2), factors)));
    },
  );

  it('tells which of two forwards it was that ends it, and answers the other', async () => {
    await prepare();
    const bad = engine.forward({ model: SLOW, requests: [step(1, TROUBLE.crash)] });
    const good = engine.forward({ model: SLOW, requests: [step(2)] });
    const later = engine.forward({ model: SLOW, requests: [step(3)] });
    await expect(bad).rejects.toMatchObject({ code: 'ERR_ENGINE_DOWN' });
    for (const [seed, answer] of [good, later].entries()) {
      const { outs } = await answer;
      expect(floatsOf(outs[0]!)).toEqual(floatsOf(standInResult(step(seed + 2), factors)));
    }
    await engine.forward({ model: SLOW, requests: [step(4)] });
    // Once with the others, and twice alone.
    expect(engine.restarts).toBe(3);
  });

  it('counts a forward that waits behind another as hung only after both their times', async () => {
    await engine.close();
    place.write('checkpoints/slow.safetensors', modelFile({ delayMs: '900' }));
    engine = await EngineProcess.start({ module: MODULE, backoffMs: 10, hangMs: 1500 });
    await prepare();
    const both = [1, 2].map((seed) => engine.forward({ model: SLOW, requests: [step(seed)] }));
    expect(await Promise.all(both)).toHaveLength(2);
    expect(engine.restarts).toBe(0);
  });

  it('ends a process that hangs, starts another and runs the call again', async () => {
    await engine.close();
    const log = (line: string): void => void lines.push(line);
    engine = await EngineProcess.start({ module: MODULE, backoffMs: 10, hangMs: 1500, log });
    await prepare();
    const hung = engine.pid!;
    process.kill(hung, 'SIGSTOP');
    const { outs } = await engine.forward({ model: SLOW, requests: [step(4)] });
    expect(floatsOf(outs[0]!)).toEqual(floatsOf(standInResult(step(4), factors)));
    expect(engine).toMatchObject({ restarts: 1, alive: true });
    expect(() => process.kill(hung, 0)).toThrow();
    expect(lines.some((line) => line.includes('it hung: no answer to forward within 1500 ms'))).toBe(true);
  });

  it('does not take a load that shows progress for hung', async () => {
    await engine.close();
    place.write('checkpoints/big.safetensors', modelFile({ loadMs: '900', loadParts: '6' }));
    engine = await EngineProcess.start({ module: MODULE, backoffMs: 10, hangMs: 600 });
    expect(await engine.loadModel(source('big.safetensors'), 'f32')).toMatchObject({ dtype: 'f32' });
    expect(engine.restarts).toBe(0);
  });

  it('tells at once what it cannot do while no process can be started', async () => {
    await engine.close();
    const flag = join(place.dir, 'broken');
    place.write(
      'flaky.mjs',
      Buffer.from(
        `import { existsSync } from 'node:fs';
         import { StandInEngine } from ${JSON.stringify(MODULE)};
         export const Engine = { create: () => {
           if (existsSync(${JSON.stringify(flag)})) throw new Error('the driver is gone');
           return StandInEngine.create();
         } };`,
      ),
    );
    const module = `file://${join(place.dir, 'flaky.mjs')}`;
    engine = await EngineProcess.start({ module, backoffMs: 300, log: (line) => lines.push(line) });
    await prepare();
    place.write('broken', Buffer.of());
    const running = engine.forward({ model: SLOW, requests: [step(1)] });
    kill();
    await expect(running).rejects.toMatchObject({ code: 'ERR_ENGINE_DOWN' });
    const since = performance.now();
    await expect(engine.forward({ model: SLOW, requests: [step(1)] })).rejects.toMatchObject({
      code: 'ERR_ENGINE_DOWN',
      message: expect.stringContaining('the driver is gone'),
      details: { retryAfterMs: expect.any(Number) },
    });
    expect(performance.now() - since).toBeLessThan(100);
    rmSync(flag);
    while (!engine.alive) await sleep(20);
    const { outs } = await engine.forward({ model: SLOW, requests: [step(2)] });
    expect(floatsOf(outs[0]!)).toEqual(floatsOf(standInResult(step(2), factors)));
    expect(lines.some((line) => line.includes('runs again'))).toBe(true);
  });

  it('forgets a model that ends two processes while they load it again', async () => {
    await prepare();
    place.write('checkpoints/slow.safetensors', modelFile({ crash: 'yes' }));
    kill();
    await expect(engine.forward({ model: SLOW, requests: [step(1)] })).rejects.toMatchObject({
      code: expect.stringMatching(/ERR_ENGINE_DOWN|ERR_MODEL_NOT_LOADED/),
    });
    while (!engine.alive) await sleep(20);
    await expect(engine.forward({ model: SLOW, requests: [step(1)] })).rejects.toMatchObject({
      code: 'ERR_MODEL_NOT_LOADED',
    });
    expect(lines.filter((line) => line.includes('could not be loaded again'))).toHaveLength(1);
  });

  it('forgets a model whose file has gone when it starts again', async () => {
    await prepare();
    place.remove();
    kill();
    await sleep(20);
    await expect(engine.forward({ model: SLOW, requests: [step(1)] })).rejects.toMatchObject({
      code: 'ERR_MODEL_NOT_LOADED',
    });
    expect(lines.some((line) => line.includes('could not be loaded again'))).toBe(true);
  });

  it('is not told the token of the server', async () => {
    process.env.UNETD_TOKEN = 'a-secret-of-this-test';
    const other = await EngineProcess.start({ module: MODULE });
    delete process.env.UNETD_TOKEN;
    expect(readFileSync(`/proc/${other.pid}/environ`, 'utf8')).not.toContain('a-secret-of-this-test');
    await other.close();
  });

  it('ends when it is closed, and takes no more calls', async () => {
    const { pid } = engine;
    await engine.close();
    expect(() => process.kill(pid!, 0)).toThrow();
    await expect(engine.stats()).rejects.toMatchObject({ code: 'ERR_ENGINE_DOWN' });
  });

  it('says why it cannot start', async () => {
    const broken = makePlace();
    const write = (name: string, text: string): string => {
      broken.write(name, Buffer.from(text));
      return `file://${join(broken.dir, name)}`;
    };
    const refusing = write(
      'refusing.mjs',
      `export const Engine = { create: async () => { throw new Error('no adapter here'); } };`,
    );
    const dying = write('dying.mjs', `console.error('driver fell over'); process.exit(3);`);
    await expect(EngineProcess.start({ module: refusing })).rejects.toThrow('no adapter here');
    await expect(EngineProcess.start({ module: dying })).rejects.toMatchObject({
      code: 'ERR_ENGINE_DOWN',
      message: expect.stringMatching(/exit code 3.*driver fell over/),
    });
    broken.remove();
  });
});

describe('a server with an engine process', () => {
  it('answers all clients though the engine is killed under load, and a poisonous request fails alone', async () => {
    const stage = await openStage(place, {}, engine as unknown as StandInEngine);
    const clients = await Promise.all([1, 2, 3, 4].map(() => stage.connect()));
    await clients[0]!.modelLoad(SLOW);
    const all = clients.flatMap((client, owner) =>
      [1, 2, 3, 4, 5].map(async (seed) => {
        const sent = request(SLOW, 1, 10 * owner + seed);
        const { out } = await client.forward(sent);
        expect(floatsOf(out)).toEqual(floatsOf(standInResult({ loras: [], ...sent }, factors)));
      }),
    );
    await sleep(60);
    kill();
    await Promise.all(all);
    expect(await clients[0]!.stats()).toMatchObject({ restarts: 1, forwards: { completed: 20, failed: 0 } });

    const first = clients[0]!.forward(request(SLOW, 1, 1));
    const poison = request(SLOW, 1, 2);
    new DataView(poison.context.data.buffer).setFloat32(0, TROUBLE.crash, true);
    const results = await Promise.allSettled([
      first,
      clients[1]!.forward(poison),
      clients[2]!.forward(request(SLOW, 1, 3)),
    ]);
    expect(results.map((result) => (result.status === 'fulfilled' ? 'ok' : result.reason.code))).toEqual([
      'ok',
      'ERR_ENGINE_DOWN',
      'ok',
    ]);
    expect(results[1]).toMatchObject({ reason: { message: expect.stringContaining('it is not run again') } });
    // Once with its batch, twice alone.
    await expect.poll(async () => (await clients[0]!.stats()).restarts).toBe(4);
    await stage.end();
  });
});
