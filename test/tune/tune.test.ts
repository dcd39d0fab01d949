/** Rung `software`: choices measured inside forwards of a small UNet, and forwards that are the same under all of them. */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import { withTuning, writeTunings } from '../../src/engine/tuning.ts';
import type { FileSource, StepRequest } from '../../src/engine/types.ts';
import type { Choices, Decision } from '../../src/gpu/kernel.ts';
import { toF32 } from '../../src/half.ts';
import { writeAdapter } from '../../src/tune/stand-in.ts';
import { tableOf } from '../../src/tune/table.ts';
import { stepOf, tune, type Workload } from '../../src/tune/tune.ts';
import { modelFile, sourceOf, temporaryFolder } from '../engine/setting.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { normalisedError, TOLERANCE } from '../unet/whole.ts';

const [folder, remove] = temporaryFolder();
const SIZE = [8, 8] as const;
let engine: Engine;
let model: FileSource;
let step: StepRequest;

beforeAll(async () => {
  engine = await Engine.create({ tuning: false });
  model = modelFile(folder, readFixture('sd1'));
  const { config } = await engine.loadModel(model, 'f16');
  const lora = sourceOf(folder, 'lora');
  writeAdapter(lora.path, config, 8);
  const { unmatched } = await engine.loadAdapter(lora, model.name);
  expect(unmatched).toEqual([]);
  step = stepOf(config, 1, SIZE, [{ lora: 'lora', strength: 1 }]);
});
afterAll(async () => {
  await engine.close();
  remove();
});

async function resultOf(request: StepRequest): Promise<Float32Array> {
  const { outs } = await engine.forward({ model: model.name, requests: [request] });
  return toF32(outs[0]!.dtype, outs[0]!.data);
}

async function decisionsOf(of: Engine = engine): Promise<readonly Decision[]> {
  return of.decisions({ model: model.name, requests: [step] });
}

/** The variants that a profiled forward ran, by point. */
async function variantsOf(of: Engine): Promise<ReadonlyMap<string, string>> {
  const timings = await of.profile({ model: model.name, requests: [step] });
  return new Map(timings.flatMap(({ point, variant }) => (point === undefined ? [] : [[point, variant]])));
}

/** The i-th candidate of every point that has so many. */
const nth = (decisions: readonly Decision[], i: number): Choices =>
  new Map(
    decisions.flatMap(({ point, candidates }) => (candidates[i] ? [[point, candidates[i]] as const] : [])),
  );

describe('choices inside a forward', () => {
  test('change how it is computed, and not what, whichever candidates are taken', async () => {
    const decisions = await decisionsOf();
    const kernels = new Set(decisions.map(({ point }) => point.split(' ')[0]));
    expect([...kernels].sort()).toEqual(['attention', 'gemm', 'layer_norm', 'lora_down']);
    const most = Math.max(...decisions.map(({ candidates }) => candidates.length));
    const byRules = await resultOf(step);
    const errors: number[] = [];
    for (let i = 0; i < most; i++) {
      const choices = nth(decisions, i);
      await engine.choose(model.name, choices);
      const ran = await variantsOf(engine);
      for (const [point, { variant }] of choices) if (ran.has(point)) expect(ran.get(point)).toBe(variant);
      errors.push(normalisedError(await resultOf(step), byRules));
    }
    console.log(
      `[tune] normalised errors against the rules: ${errors.map((e) => e.toExponential(1)).join(', ')}`,
    );
    expect(errors[0]).toBe(0);
    // Sums in another order round differently: the others have run indeed.
    for (const error of errors.slice(1)) expect(error).toBeGreaterThan(0);
    for (const error of errors) expect(error).toBeLessThan(TOLERANCE.f16);
  });

  test('are measured, shown and kept: a later engine on the same device takes them', async () => {
    const plain = { ...step, loras: [] };
    const workloads = [plain, step].map(
      (request): Workload => ({
        label: request.loras.length > 0 ? 'with a LoRA' : 'plain',
        batch: { model: model.name, requests: [request] },
      }),
    ) as [Workload, Workload];
    const tuned = await tune(engine, workloads, { rounds: 1 });
    // Rounds this few say nothing of the times: which of the candidates were kept is left open.
    const points = new Map((await decisionsOf()).map(({ point, candidates }) => [point, candidates]));
    expect(tuned.choices.size).toBeGreaterThan(20);
    for (const [point, choice] of tuned.choices)
      expect([undefined, ...points.get(point)!.slice(1)]).toContainEqual(choice);
    const shares = tuned.rows.map(({ use }) => use!.share);
    expect(Math.max(...shares)).toBeLessThan(1);
    expect(tuned.forwards.map(({ label }) => label)).toEqual(['all', 'plain', 'with a LoRA']);
    for (const { rulesMs, tunedMs } of tuned.forwards) expect(Math.min(rulesMs, tunedMs)).toBeGreaterThan(0);
    const table = tableOf(tuned);
    for (const [point] of tuned.choices) expect(table).toContain(point);

    const path = join(folder, 'tuning.json');
    const choices = nth(await decisionsOf(), 1);
    writeTunings(path, withTuning([], engine.tunedFor, choices));
    const later = await Engine.create({ tuning: path });
    try {
      expect(later.device.tuned).toBe(choices.size);
      await later.loadModel(model, 'f16');
      await later.loadAdapter(sourceOf(folder, 'lora'), model.name);
      const ran = await variantsOf(later);
      for (const [point, { variant }] of choices) if (ran.has(point)) expect(ran.get(point)).toBe(variant);
    } finally {
      await later.close();
    }
  });

  test('that were measured elsewhere, or with other kernels, are left alone', async () => {
    const path = join(folder, 'elsewhere.json');
    const choices = nth(await decisionsOf(), 1);
    writeTunings(path, [{ ...engine.tunedFor, revision: 'another', choices }]);
    const later = await Engine.create({ tuning: path });
    expect(later.device.tuned).toBeUndefined();
    await later.close();
  });
});
