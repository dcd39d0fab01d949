/** Rung `software`: the engine as a library against the reference, with LoRA files, batches, layouts and dtypes. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { StepRequest, StorageDtype } from '../../src/engine/types.ts';
import { toF32 } from '../../src/half.ts';
import {
  ARCHITECTURES,
  type Case,
  caseOf,
  type Fixture,
  readFixture,
  writeLora,
} from '../fixtures/fixture.ts';
import { writeCheckpoint } from '../fixtures/weights.ts';
import { normalisedError, requestOf, rowsOf, TOLERANCE } from '../unet/whole.ts';

const folder = mkdtempSync(join(tmpdir(), 'unetd-engine-'));
let engine: Engine;

beforeAll(async () => {
  engine = await Engine.create();
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});

async function open(fixture: Fixture, dtype: StorageDtype): Promise<string> {
  const model = fixture.metadata.architecture;
  const path = join(folder, `${model}.safetensors`);
  writeCheckpoint(path, fixture.metadata.tensors, { dtype: 'F16', layout: 'ldm' });
  await engine.loadModel({ name: model, path, version: '1' }, dtype);
  for (const file of Object.keys(fixture.metadata.loras)) {
    const lora = join(folder, `${model}-${file}.safetensors`);
    writeLora(lora, fixture, file);
    const info = await engine.loadAdapter({ name: file, path: lora, version: '1' }, model);
    expect(info.unmatched).toEqual([]);
  }
  return model;
}

/** The requests of a case, one per image, each with its own stack. */
function rows(which: Case): readonly StepRequest[] {
  return rowsOf(requestOf(which)).map((request, row) => ({
    ...request,
    loras: (which.adapters[row] ?? which.adapters[0] ?? []).map(([lora, strength]) => ({ lora, strength })),
  }));
}

async function run(model: string, requests: readonly StepRequest[]): Promise<Float32Array> {
  const { outs } = await engine.forward({ model, requests });
  const parts = outs.map((out) => toF32(out.dtype, out.data));
  const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

describe.each(ARCHITECTURES)('%s as a whole (software)', (architecture) => {
  const fixture = readFixture(architecture);

  test.each(['f32', 'f16', 'q8_0'] as const)(
    'all cases agree in %s storage, LoRA stacks included',
    async (storage) => {
      const model = await open(fixture, storage);
      const errors: Record<string, number> = {};
      for (const which of fixture.metadata.cases) {
        const out = await run(model, rows(which));
        errors[which.name] = normalisedError(out, fixture.tensor(which.output).data);
      }
      await engine.unloadModel(model);
      console.log(
        `${architecture} ${storage}: ${Object.entries(errors)
          .map(([n, e]) => `${n} ${e.toExponential(1)}`)
          .join(', ')}`,
      );
      for (const [name, error] of Object.entries(errors))
        expect(error, name).toBeLessThan(TOLERANCE[storage]);
    },
  );
});

describe('LoRA in the kernel (software)', () => {
  const fixture = readFixture('sd1');
  let model: string;
  beforeAll(async () => {
    model = await open(fixture, 'f32');
  });
  afterAll(() => engine.unloadModel(model));

  test('a batch of four requests with four stacks equals four single requests', async () => {
    const requests = rows(caseOf(fixture, 'lora/rows'));
    expect(new Set(requests.map((r) => JSON.stringify(r.loras))).size).toBe(4);
    const together = await engine.forward({ model, requests });
    for (const [i, request] of requests.entries()) {
      const alone = await engine.forward({ model, requests: [request] });
      expect(
        normalisedError(toF32('F32', together.outs[i]!.data), toF32('F32', alone.outs[0]!.data)),
      ).toBeLessThan(1e-6);
    }
  });

  test('permuting a batch permutes its results', async () => {
    const requests = rows(caseOf(fixture, 'lora/rows'));
    const order = [2, 0, 3, 1];
    const straight = await engine.forward({ model, requests });
    const permuted = await engine.forward({ model, requests: order.map((i) => requests[i]!) });
    for (const [to, from] of order.entries())
      expect(permuted.outs[to]!.data).toEqual(straight.outs[from]!.data);
  });

  test('strength 0 equals no adapter, bit for bit', async () => {
    const [base] = rows(caseOf(fixture, 'base'));
    const zero = { ...base!, loras: [{ lora: 'style', strength: 0 }] };
    expect(await run(model, [zero])).toEqual(await run(model, [base!]));
  });

  test('an adapter twice in a stack equals the sum of its strengths', async () => {
    const [base] = rows(caseOf(fixture, 'base'));
    const stack = (...strengths: number[]) => ({
      ...base!,
      loras: strengths.map((strength) => ({ lora: 'style', strength })),
    });
    const error = normalisedError(await run(model, [stack(0.5, -1.25)]), await run(model, [stack(-0.75)]));
    expect(error).toBeLessThan(1e-5);
  });

  test('a thousand LoRA requests leave every weight as it was, bit for bit, and memory where it was', async () => {
    const before = await engine.readWeights(model);
    const [base] = rows(caseOf(fixture, 'base'));
    const files = Object.keys(fixture.metadata.loras);
    const all = { ...base!, loras: files.map((lora) => ({ lora, strength: 1 })) };
    await engine.forward({ model, requests: Array.from({ length: 8 }, () => all) });
    const { memory } = await engine.stats();
    // 125 batches of eight, every row with a stack of its own.
    for (let i = 0; i < 1000; i += 8) {
      const requests = Array.from({ length: 8 }, (_, row) => ({
        ...base!,
        loras: files
          .slice((i + row) % 3, ((i + row) % 3) + 2)
          .map((lora) => ({ lora, strength: Math.sin(i + row) })),
      }));
      await engine.forward({ model, requests });
    }
    const after = await engine.readWeights(model);
    expect(after.every((bytes, i) => Buffer.compare(bytes, before[i]!) === 0)).toBe(true);
    expect((await engine.stats()).memory).toEqual(memory);
  });
});
