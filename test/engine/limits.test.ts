/** Rung `software`: what the engine does at the limits of bindings and of memory. Speed and numbers are elsewhere. */
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { EngineOptions, StepRequest } from '../../src/engine/types.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { normalisedError } from '../unet/whole.ts';
import {
  failureOf,
  loraFile,
  modelFile,
  rowsOfCase,
  run,
  sourceOf,
  stack,
  temporaryFolder,
} from './setting.ts';

const [folder, remove] = temporaryFolder();
const fixture = readFixture('sd1');
const LORAS = Object.keys(fixture.metadata.loras);
const base = rowsOfCase(fixture, 'base')[0]!;
const rows = rowsOfCase(fixture, 'lora/rows');
const model = modelFile(folder, fixture, 'model');
for (const lora of LORAS) loraFile(folder, fixture, lora);

/** Results of an engine without any limit. */
let expectedRows: Float32Array;
let expectedBase: Float32Array;
const expectedSingle = new Map<string, Float32Array>();
/** Bytes of the model in f32, and of the adapter that takes most. */
let modelBytes = 0;
let largestLora = 0;

async function engineWith(options: EngineOptions, loras: readonly string[] = LORAS): Promise<Engine> {
  const engine = await Engine.create(options);
  await engine.loadModel(model, 'f32');
  for (const lora of loras) await engine.loadAdapter(sourceOf(folder, lora), 'model');
  return engine;
}

const with1 = (lora: string): StepRequest => ({ ...base, loras: stack([lora, 1]) });

beforeAll(async () => {
  const engine = await engineWith({});
  expectedRows = await run(engine, 'model', rows);
  expectedBase = await run(engine, 'model', [base]);
  for (const lora of LORAS) expectedSingle.set(lora, await run(engine, 'model', [with1(lora)]));
  const [info] = (await engine.stats()).models;
  modelBytes = info!.sizeBytes;
  largestLora = Math.max(...info!.adapters.map(({ sizeBytes }) => sizeBytes));
  await engine.close();
});
afterAll(remove);

describe('a small binding (software)', () => {
  test('of 1 MiB splits weights and changes no result, stacks of all adapters included', async () => {
    const engine = await engineWith({ maxBindingBytes: 1024 * 1024 });
    expect(normalisedError(await run(engine, 'model', [base]), expectedBase)).toBeLessThan(1e-6);
    expect(normalisedError(await run(engine, 'model', rows), expectedRows)).toBeLessThan(1e-6);
    await engine.close();
  });

  test('of 300 KiB, hardly more than 32 columns of the widest layer, changes no result either', async () => {
    const engine = await engineWith({ maxBindingBytes: 300 * 1024 }, ['style', 'processor']);
    expect(normalisedError(await run(engine, 'model', [base]), expectedBase)).toBeLessThan(1e-6);
    const out = await run(engine, 'model', [rows[2]!]);
    const image = expectedRows.length / rows.length;
    expect(normalisedError(out, expectedRows.subarray(2 * image, 3 * image))).toBeLessThan(1e-6);
    await engine.close();
  });

  test('of 240 KiB splits weights in 8-bit blocks and changes no result either', async () => {
    const outs = [];
    for (const options of [{}, { maxBindingBytes: 240 * 1024 }]) {
      const engine = await Engine.create(options);
      await engine.loadModel(model, 'q8_0');
      outs.push(await run(engine, 'model', [base]));
      await engine.close();
    }
    expect(normalisedError(outs[1]!, outs[0]!)).toBeLessThan(1e-6);
  });

  test('too small for two LoRAs of a layer at once refuses the stack of both, and takes either', async () => {
    const engine = await engineWith({ maxBindingBytes: 300 * 1024 }, ['subject']);
    const twin = loraFile(folder, fixture, 'subject', 'twin');
    // One bit apart: files with the same tensors are one adapter.
    const bytes = readFileSync(twin.path);
    bytes[bytes.length - 1]! ^= 0x80;
    writeFileSync(twin.path, bytes);
    await engine.loadAdapter(twin, 'model');
    const expectedTwin = await run(engine, 'model', [with1('twin')]);
    const both = { ...base, loras: stack(['subject', 1], ['twin', 1]) };
    const error = await failureOf(engine.forward({ model: 'model', requests: [both] }));
    expect(error.code).toBe('ERR_OUT_OF_MEMORY');
    expect(error.message).toMatch(/takes \d+ bytes .* no buffer that the GPU can bind.*use fewer or smaller/);
    expect(await run(engine, 'model', [with1('subject')])).toEqual(expectedSingle.get('subject'));
    expect(await run(engine, 'model', [with1('twin')])).toEqual(expectedTwin);
    await engine.close();
  });

  test('too small for an activation is ERR_TOO_LARGE with both numbers, and the engine lives on', async () => {
    const maxBindingBytes = 300 * 1024;
    const engine = await engineWith({ maxBindingBytes }, []);
    const large: StepRequest = {
      ...base,
      x: { dtype: 'F32', shape: [1, 4, 64, 64], data: new Uint8Array(4 * 64 * 64 * 4) },
    };
    const error = await failureOf(engine.forward({ model: 'model', requests: [large] }));
    expect(error.code).toBe('ERR_TOO_LARGE');
    expect(error.message).toMatch(
      /needs \d+ bytes, the adapter binds at most 307200; use a smaller batch or latent/,
    );
    expect(error.details).toMatchObject({ limit: maxBindingBytes });
    expect(error.details.needed).toBeGreaterThan(maxBindingBytes);
    expect(await run(engine, 'model', [base])).toEqual(expectedBase);
    await engine.close();
  });

  test('too small for the low-rank terms of a batch is ERR_TOO_LARGE, and one request still runs', async () => {
    const engine = await engineWith({ maxBindingBytes: 300 * 1024 }, ['style']);
    const many = Array.from({ length: 200 }, () => ['style', 0.1] as const);
    const error = await failureOf(
      engine.forward({ model: 'model', requests: [{ ...base, loras: stack(...many) }] }),
    );
    expect(error).toMatchObject({ code: 'ERR_TOO_LARGE', details: { limit: 300 * 1024 } });
    expect(error.message).toMatch(/The LoRA stacks of this batch need \d+ bytes of scratch/);
    expect(await run(engine, 'model', [with1('style')])).toEqual(expectedSingle.get('style'));
    await engine.close();
  });

  test('too small for 32 columns of a layer refuses the model', async () => {
    const engine = await Engine.create({ maxBindingBytes: 64 * 1024 });
    const error = await failureOf(engine.loadModel(model, 'f32'));
    expect(error.code).toBe('ERR_TOO_LARGE');
    expect(error.message).toMatch(
      /32 columns of .* take \d+ bytes, the adapter binds at most 65536: it cannot hold/,
    );
    expect((await engine.stats()).memory).toMatchObject({ weightBytes: 0, adapterBytes: 0 });
    await engine.close();
  });
});

describe('the memory budget (software)', () => {
  test('refuses a model that does not fit, with the numbers and the cure, and lets no other go for it', async () => {
    const memoryBudgetBytes = Math.floor(modelBytes * 0.75);
    const engine = await Engine.create({ memoryBudgetBytes });
    await engine.loadModel({ ...model, name: 'half' }, 'f16');
    const error = await failureOf(engine.loadModel(model, 'f32'));
    expect(error).toMatchObject({
      code: 'ERR_OUT_OF_MEMORY',
      details: { needed: modelBytes, budget: memoryBudgetBytes },
    });
    expect(error.message).toContain('The weights of model "model" in f32 need');
    expect(error.message).toContain('load it as f16, or raise --memory-budget');
    expect((await engine.stats()).models.map(({ model: name }) => name)).toEqual(['half']);
    expect(normalisedError(await run(engine, 'half', [base]), expectedBase)).toBeLessThan(5e-3);
    await engine.close();
  });

  test('lets the least recently used idle model go for a new one, never one that has requests', async () => {
    const engine = await Engine.create({ memoryBudgetBytes: Math.floor(modelBytes * 2.6) });
    const load = (name: string) => engine.loadModel({ ...model, name }, 'f32');
    const loaded = async () => (await engine.stats()).models.map(({ model: name }) => name);
    await load('a');
    await load('b');
    await run(engine, 'a', [base]);
    await load('c');
    expect(await loaded()).toEqual(['a', 'c']);
    // `a` is older, but works: `c` goes.
    const running = Promise.all([1, 2, 3].map(() => run(engine, 'a', [base])));
    await run(engine, 'c', [base]);
    const again = Promise.all([1, 2, 3, 4].map(() => run(engine, 'a', [base])));
    await load('d');
    expect(await loaded()).toContain('a');
    for (const out of [...(await running), ...(await again)]) expect(out).toEqual(expectedBase);
    expect(await failureOf(engine.forward({ model: 'c', requests: [base] }))).toMatchObject({
      code: 'ERR_MODEL_NOT_LOADED',
    });
    const { memory, turnover } = await engine.stats();
    expect(turnover).toMatchObject({ modelLoads: 4, modelEvictions: 2 });
    expect(memory.peakBytes).toBeLessThanOrEqual(memory.budgetBytes);
    await engine.close();
  });

  test('refuses activations that do not fit, with the numbers, and runs what does', async () => {
    const engine = await engineWith({ memoryBudgetBytes: modelBytes + 2 * 1024 * 1024 }, []);
    const x = { dtype: 'F32', shape: [1, 4, 48, 48], data: new Uint8Array(4 * 48 * 48 * 4) } as const;
    const error = await failureOf(engine.forward({ model: 'model', requests: [{ ...base, x }] }));
    expect(error.code).toBe('ERR_OUT_OF_MEMORY');
    expect(error.message).toMatch(
      /^The activations of this forward need \d+ bytes .*smaller batch or latent/,
    );
    expect(await run(engine, 'model', [base])).toEqual(expectedBase);
    await engine.close();
  });

  test('two loads of one model at a time hold its weights once', async () => {
    const engine = await Engine.create();
    const [a, b] = await Promise.all([engine.loadModel(model, 'f32'), engine.loadModel(model, 'f32')]);
    expect(a).toEqual(b);
    expect((await engine.stats()).memory.weightBytes).toBe(modelBytes);
    await engine.close();
  });
});

describe('the adapter pool with room for two (software)', () => {
  test('cycled through six gives right results from their files, and takes no more memory', async () => {
    const adapterBudgetBytes = largestLora * 2;
    const engine = await engineWith({ adapterBudgetBytes });
    const seen = new Set<number>();
    for (let round = 0; round < 3; round++)
      for (const [i, lora] of LORAS.entries()) {
        const other = LORAS[(i + 1) % LORAS.length]!;
        const requests = [with1(lora), with1(other)];
        const out = await run(engine, 'model', requests);
        const half = out.length / 2;
        expect(normalisedError(out.subarray(0, half), expectedSingle.get(lora)!)).toBeLessThan(1e-6);
        expect(normalisedError(out.subarray(half), expectedSingle.get(other)!)).toBeLessThan(1e-6);
        const { memory, models } = await engine.stats();
        expect(memory.adapterBytes).toBeLessThanOrEqual(adapterBudgetBytes);
        expect(models[0]!.adapters.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0)).toBeLessThanOrEqual(
          adapterBudgetBytes,
        );
        if (round > 0) seen.add(memory.adapterBytes);
      }
    console.log(
      `pool of ${adapterBudgetBytes} bytes for two adapters held ${[...seen]} bytes over two rounds`,
    );
    await engine.close();
  });

  test('refuses a stack of more than fit at once, with the numbers, and runs the next request', async () => {
    const engine = await engineWith({ adapterBudgetBytes: Math.floor(largestLora * 1.2) });
    const all = LORAS.map((lora) => [lora, 0.5] as const);
    const error = await failureOf(
      engine.forward({ model: 'model', requests: [{ ...base, loras: stack(...all) }] }),
    );
    expect(error.code).toBe('ERR_OUT_OF_MEMORY');
    expect(error.message).toMatch(/LoRA ".*" takes \d+ bytes .* may take \d+, .* take \d+: use fewer/);
    for (const lora of LORAS)
      expect(await run(engine, 'model', [with1(lora)])).toEqual(expectedSingle.get(lora));
    await engine.close();
  });
});

describe('a LoRA file that is replaced (software)', () => {
  test('changes later requests, and each one in flight sees the one version or the other', async () => {
    const engine = await engineWith({}, []);
    await engine.loadAdapter(loraFile(folder, fixture, 'style', 'mine'), 'model');
    await run(engine, 'model', [with1('mine')]);
    const requests = Array.from({ length: 6 }, () => with1('mine'));
    const running = requests.map((request) => run(engine, 'model', [request]));
    const path = loraFile(folder, fixture, 'subject', 'mine').path;
    await engine.loadAdapter({ name: 'mine', path, version: '2' }, 'model');
    const after = await run(engine, 'model', [with1('mine')]);
    expect(after).toEqual(expectedSingle.get('subject'));
    const versions = (await Promise.all(running)).map((out) =>
      ['style', 'subject'].filter((lora) => normalisedError(out, expectedSingle.get(lora)!) === 0).join(),
    );
    expect(versions[0]).toBe('style');
    expect(versions.every((version) => version !== '')).toBe(true);
    const { models } = await engine.stats();
    expect(models[0]!.adapters.map(({ lora }) => lora)).toEqual(['mine']);
    // The old version stays until the new one is there: two of the largest, and no more however often.
    await engine.loadAdapter({ name: 'mine', path, version: '3' }, 'model');
    const { memory } = await engine.stats();
    for (const version of ['4', '5', '6']) await engine.loadAdapter({ name: 'mine', path, version }, 'model');
    expect((await engine.stats()).memory).toEqual(memory);
    await engine.close();
  });

  test('is asked for again when it was let go and its file is another one now', async () => {
    const engine = await engineWith({ adapterBudgetBytes: Math.floor(largestLora * 1.2) }, []);
    await engine.loadAdapter(loraFile(folder, fixture, 'style', 'mine'), 'model');
    await engine.loadAdapter(sourceOf(folder, 'subject'), 'model');
    const { turnover } = await engine.stats();
    expect(turnover).toEqual({ modelLoads: 1, modelEvictions: 0, adapterLoads: 2, adapterEvictions: 1 });
    const { path } = loraFile(folder, fixture, 'peft', 'mine');
    const error = await failureOf(engine.forward({ model: 'model', requests: [with1('mine')] }));
    expect(error).toMatchObject({ code: 'ERR_UNKNOWN_LORA' });
    expect(error.message).toMatch(/^The file of LoRA "mine" has changed since .*; load it again$/);
    await engine.loadAdapter({ name: 'mine', path, version: '2' }, 'model');
    expect(await run(engine, 'model', [with1('mine')])).toEqual(expectedSingle.get('peft'));
    await engine.close();
  });

  test('fails the requests that need it when it was let go and is gone, and no others', async () => {
    const engine = await engineWith({ adapterBudgetBytes: Math.floor(largestLora * 1.2) }, []);
    const mine = loraFile(folder, fixture, 'style', 'mine');
    await engine.loadAdapter(mine, 'model');
    await engine.loadAdapter(sourceOf(folder, 'subject'), 'model');
    rmSync(mine.path);
    const error = await failureOf(engine.forward({ model: 'model', requests: [with1('mine')] }));
    expect(error).toMatchObject({
      code: 'ERR_UNKNOWN_LORA',
      message: 'The file of LoRA "mine" has gone since it was loaded; load it again',
    });
    expect(await run(engine, 'model', [with1('subject')])).toEqual(expectedSingle.get('subject'));
    // Back again, as it was: nothing needs to be loaded anew.
    loraFile(folder, fixture, 'style', 'mine');
    expect(await run(engine, 'model', [with1('mine')])).toEqual(expectedSingle.get('style'));
    await engine.close();
  });
});
