/**
 * Rung `software`: what steps with adapters that are on the GPU hand to it, counted at the bindings. Strengths that change
 * from step to step, and stacks that take turns, are numbers in a table; kinds that patch weights make their copies
 * anew for a new strength, of what is on the GPU. What steps compute is tested elsewhere.
 */
import { writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { EngineStats, LoraUse } from '../../src/engine/types.ts';
import { encode } from '../../src/safetensors.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { readKinds } from '../fixtures/kinds.ts';
import { type Traffic, trafficOf } from '../gpu/traffic.ts';
import { loraFile, modelFile, rowsOfCase, run, sourceOf, stack, temporaryFolder } from './setting.ts';

const [folder, remove] = temporaryFolder();
const fixture = readFixture('sd1');
const base = rowsOfCase(fixture, 'base')[0]!;
const STEPS = 12;

let engine: Engine;
beforeAll(async () => {
  engine = await Engine.create();
  await engine.loadModel(modelFile(folder, fixture, 'model'), 'f32');
  for (const lora of ['style', 'subject']) await engine.loadAdapter(loraFile(folder, fixture, lora), 'model');
  const dora = sourceOf(folder, 'dora');
  const tensors = readKinds('sd1').tensorsOf('dora');
  writeFileSync(
    dora.path,
    encode(
      tensors.map(({ key, shape, values }) => ({
        name: key,
        dtype: 'F32',
        shape,
        data: new Uint8Array(values.buffer),
      })),
    ),
  );
  await engine.loadAdapter(dora, 'model');
});
afterAll(async () => {
  await engine.close();
  remove();
});

interface Schedule {
  readonly traffic: Traffic;
  readonly outs: readonly Float32Array[];
  readonly memory: EngineStats['memory'];
}

/** Twelve steps with a stack each. */
async function schedule(lorasOf: (step: number) => readonly LoraUse[]): Promise<Schedule> {
  const [traffic, outs] = await trafficOf(async () => {
    const each: Float32Array[] = [];
    for (let step = 0; step < STEPS; step++)
      each.push(await run(engine, 'model', [{ ...base, loras: lorasOf(step) }]));
    return each;
  });
  return { traffic, outs, memory: (await engine.stats()).memory };
}

const different = (outs: readonly Float32Array[]): number =>
  new Set(outs.map((out) => Buffer.from(out.buffer).toString('base64'))).size;

describe('steps with low-rank adapters (software)', () => {
  test('the counter sees an adapter that is loaded, modules that are compiled, and dispatches', async () => {
    const [{ written, compiled, dispatched }] = await trafficOf(async () => {
      await engine.loadAdapter(loraFile(folder, fixture, 'peft'), 'model');
      await run(engine, 'model', [{ ...base, loras: stack(['style', 1]) }]);
    });
    expect(written.get('adapters')).toBeGreaterThan(10_000);
    expect(compiled).toBeGreaterThan(10);
    expect(dispatched).toBeGreaterThan(100);
  });

  test('a strength that changes at every step costs not a byte nor a dispatch over one that stays', async () => {
    await run(engine, 'model', [{ ...base, loras: stack(['style', 1], ['subject', 1]) }]);
    const fixed = await schedule(() => stack(['style', 0.5], ['subject', 0.5]));
    const scheduled = await schedule((step) =>
      stack(['style', 1 - step / STEPS], ['subject', -1 - step / 9]),
    );
    expect(scheduled.traffic).toEqual(fixed.traffic);
    expect(scheduled.memory).toEqual(fixed.memory);
    expect(scheduled.traffic.compiled).toBe(0);
    expect(scheduled.traffic.written.has('adapters')).toBe(false);
    expect(scheduled.traffic.written.get('lora table')).toBeGreaterThan(0);
    expect(different(fixed.outs)).toBe(1);
    expect(different(scheduled.outs)).toBe(STEPS);
  });

  test('adapters that take turns upload no adapter and compile nothing', async () => {
    for (const lora of ['style', 'subject'])
      await run(engine, 'model', [{ ...base, loras: stack([lora, 1]) }]);
    const { traffic, outs } = await schedule((step) => stack([['style', 'subject'][step % 2]!, 1]));
    expect(traffic.compiled).toBe(0);
    expect(traffic.written.has('adapters')).toBe(false);
    for (const [step, out] of outs.entries()) expect(out).toEqual(outs[step % 2]);
    expect(different(outs)).toBe(2);
  });
});

describe('steps with an adapter that patches weights (software)', () => {
  test('make copies for each new strength of what is on the GPU, and find those of an earlier one', async () => {
    await run(engine, 'model', [{ ...base, loras: stack(['dora', 1]) }]);
    const fixed = await schedule(() => stack(['dora', 1]));
    const strengthAt = (step: number): number => 0.9 - step / STEPS;
    const fresh = await schedule((step) => stack(['dora', strengthAt(step)]));
    const again = await schedule((step) => stack(['dora', strengthAt(step)]));
    for (const { traffic } of [fixed, fresh, again]) {
      expect(traffic.compiled).toBe(0);
      expect(traffic.written.has('adapters')).toBe(false);
    }
    expect(different(fresh.outs)).toBe(STEPS);
    expect(again.outs).toEqual(fresh.outs);
    // There is room for all copies here: a second pass over the schedule costs what a fixed strength does.
    expect(again.traffic).toEqual(fixed.traffic);
    expect(again.memory).toEqual(fresh.memory);
    const perStep = (traffic: Traffic): string => (traffic.dispatched / STEPS).toFixed(1);
    const copies = (fresh.memory.adapterBytes - fixed.memory.adapterBytes) / STEPS;
    console.log(
      `DoRA: ${perStep(fixed.traffic)} dispatches a step, ${perStep(fresh.traffic)} with a new strength, whose copies take ${copies} bytes`,
    );
    expect(fresh.traffic.dispatched).toBeGreaterThan(fixed.traffic.dispatched);
    expect(copies).toBeGreaterThan(0);
  });
});
