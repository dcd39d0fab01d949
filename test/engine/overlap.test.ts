/**
 * Rung `software`: forwards that are given together, so that one is made ready while the one before runs. What each computes is
 * what it computes alone, to the bit, whatever runs before and behind it.
 */
import { writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { globals } from 'webgpu';
import { Engine } from '../../src/engine/engine.ts';
import type { BatchResult, StepRequest } from '../../src/engine/types.ts';
import { encode } from '../../src/safetensors.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { readKinds } from '../fixtures/kinds.ts';
import { failureOf, loraFile, modelFile, rowsOfCase, sourceOf, stack, temporaryFolder } from './setting.ts';

const [folder, remove] = temporaryFolder();
const fixture = readFixture('sd1');
const base = rowsOfCase(fixture, 'base')[0]!;
const odd = rowsOfCase(fixture, 'odd')[0]!;

/** Batches of several shapes, sizes and kinds of LoRA: neighbours share nothing, a plan, a table, or a patched weight. */
const batches: readonly (readonly StepRequest[])[] = [
  [base],
  [{ ...base, loras: stack(['style', 0.7]) }],
  [{ ...base, loras: stack(['style', -0.3], ['subject', 1]) }],
  [odd],
  [{ ...odd, loras: stack(['dora', 0.9]) }],
  [base, { ...base, loras: stack(['dora', 0.9]) }],
  [{ ...base, loras: stack(['dora', 0.4], ['subject', 0.5]) }],
  Array.from({ length: 5 }, (_, n) => ({ ...base, loras: stack(['subject', n / 4]) })),
  rowsOfCase(fixture, 'control'),
  [base],
];

async function open(memoryBudgetBytes?: number): Promise<Engine> {
  const engine = await Engine.create(memoryBudgetBytes === undefined ? {} : { memoryBudgetBytes });
  await engine.loadModel(modelFile(folder, fixture, 'model'), 'f32');
  for (const lora of ['style', 'subject']) await engine.loadAdapter(loraFile(folder, fixture, lora), 'model');
  await engine.loadAdapter(sourceOf(folder, 'dora'), 'model');
  return engine;
}

const bytesOf = ({ outs }: BatchResult): string =>
  outs.map(({ data }) => Buffer.from(data).toString('hex')).join();

let alone: string[];
let engine: Engine;
beforeAll(async () => {
  const tensors = readKinds('sd1').tensorsOf('dora');
  const entries = tensors.map(({ key: name, shape, values }) => {
    return { name, dtype: 'F32' as const, shape, data: new Uint8Array(values.buffer) };
  });
  writeFileSync(sourceOf(folder, 'dora').path, encode(entries));
  const each = await open();
  alone = [];
  for (const requests of batches) alone.push(bytesOf(await each.forward({ model: 'model', requests })));
  await each.close();
  engine = await open();
});
afterAll(async () => {
  await engine.close();
  remove();
});

describe('forwards given together (software)', () => {
  test('compute what each computes alone, while buffers grow and when all is there', async () => {
    for (let round = 0; round < 2; round++) {
      const results = await Promise.all(
        batches.map((requests) => engine.forward({ model: 'model', requests })),
      );
      expect(results.map(bytesOf)).toEqual(alone);
    }
  });

  test('leave no memory behind that those given one by one do not', async () => {
    const before = (await engine.stats()).memory;
    for (let round = 0; round < 3; round++)
      await Promise.all(batches.map((requests) => engine.forward({ model: 'model', requests })));
    expect((await engine.stats()).memory).toEqual(before);
  });

  test('are submitted while the one before still runs, two at most', async () => {
    const events: string[] = [];
    const { GPUQueue, GPUBuffer } = globals as unknown as {
      readonly GPUQueue: { readonly prototype: GPUQueue };
      readonly GPUBuffer: { readonly prototype: GPUBuffer };
    };
    const { submit } = GPUQueue.prototype;
    const { unmap } = GPUBuffer.prototype;
    GPUQueue.prototype.submit = function (this: GPUQueue, buffers) {
      events.push('submit');
      return submit.call(this, buffers);
    };
    GPUBuffer.prototype.unmap = function (this: GPUBuffer) {
      events.push('read');
      return unmap.call(this);
    };
    try {
      await Promise.all([1, 2, 3, 4].map(() => engine.forward({ model: 'model', requests: [base] })));
    } finally {
      GPUQueue.prototype.submit = submit;
      GPUBuffer.prototype.unmap = unmap;
    }
    expect(events.join(' ')).toBe('submit submit read submit read submit read read');
  });

  test('count the time of their own forward each', async () => {
    const given = batches.at(-1)!;
    const time = async (count: number): Promise<number> => {
      const all = Array.from({ length: count }, () => engine.forward({ model: 'model', requests: given }));
      return Math.min(...(await Promise.all(all)).map(({ gpuMs }) => gpuMs));
    };
    await time(1);
    const single = Math.min(await time(1), await time(1), await time(1));
    const together = await time(6);
    console.log(
      `a forward alone ${single.toFixed(1)} ms, the quickest of six given together ${together.toFixed(1)} ms`,
    );
    // A time that counted the one ahead would be twice as long.
    expect(together).toBeLessThan(1.8 * single);
  });

  test('fail each for itself', async () => {
    const bad = { ...base, loras: stack(['none', 1]) };
    const results = [[base], [bad], [base], [{ ...base, x: odd.context }], [base]].map((requests) =>
      engine.forward({ model: 'model', requests }),
    );
    expect((await failureOf(results[1]!)).code).toBe('ERR_UNKNOWN_LORA');
    expect((await failureOf(results[3]!)).code).toBe('ERR_BAD_SHAPE');
    for (const at of [0, 2, 4]) expect(bytesOf(await results[at]!)).toBe(alone[0]);
  });

  test('are finished before their model is unloaded, or the engine closed', async () => {
    const other = await open();
    const running = [1, 2, 3].map(() => other.forward({ model: 'model', requests: [base] }));
    const unloaded = other.unloadModel('model');
    expect((await Promise.all(running)).map(bytesOf)).toEqual([alone[0], alone[0], alone[0]]);
    await unloaded;
    await other.loadModel(sourceOf(folder, 'model'), 'f32');
    const last = other.forward({ model: 'model', requests: [base] });
    await other.close();
    expect(bytesOf(await last)).toBe(alone[0]);
  });

  test('keep a model that waits from making room for another', async () => {
    const { sizeBytes } = await engine.loadModel(sourceOf(folder, 'model'), 'f32');
    const used = (await engine.stats()).memory;
    const budget = used.weightBytes + used.adapterBytes + used.arenaBytes + Math.floor(sizeBytes / 2);
    const tight = await open(budget);
    const running = [1, 2, 3].map(() => tight.forward({ model: 'model', requests: [base] }));
    const loading = failureOf(tight.loadModel({ ...sourceOf(folder, 'model'), name: 'second' }, 'f32'));
    expect((await Promise.all(running)).map(bytesOf)).toEqual([alone[0], alone[0], alone[0]]);
    expect((await loading).code).toBe('ERR_OUT_OF_MEMORY');
    await tight.close();
  });
});
