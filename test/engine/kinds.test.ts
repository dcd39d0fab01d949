/**
 * Rung `software`: every adapter kind, alone and in stacks, against ComfyUI's own merge (`load_lora_for_models`), on models
 * shaped like SD 1.5 and SDXL.
 */
import { writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { LoraUse, StepRequest, StorageDtype } from '../../src/engine/types.ts';
import { encode } from '../../src/safetensors.ts';
import { caseOf, readFixture } from '../fixtures/fixture.ts';
import { type Kinds, type KindsModel, readKinds } from '../fixtures/kinds.ts';
import { normalisedError, requestOf, rowsOf, TOLERANCE } from '../unet/whole.ts';
import { modelFile, run, sourceOf, stack, temporaryFolder } from './setting.ts';

const [folder, removeFolder] = temporaryFolder();
let engine: Engine;
beforeAll(async () => {
  engine = await Engine.create();
});
afterAll(async () => {
  await engine.close();
  removeFolder();
});

/** Loads the model and all files. */
async function open(on: Engine, model: KindsModel, kinds: Kinds, storage: StorageDtype): Promise<void> {
  await on.loadModel(modelFile(folder, readFixture(model)), storage);
  for (const file of kinds.files) {
    const tensors = kinds.tensorsOf(file).map(({ key, shape, values }) => ({
      name: key,
      dtype: values instanceof Float32Array ? ('F32' as const) : ('I64' as const),
      shape,
      data: new Uint8Array(values.buffer),
    }));
    const source = sourceOf(folder, `${model}-${file}`);
    writeFileSync(source.path, encode(tensors));
    const info = await on.loadAdapter({ ...source, name: file }, model);
    expect(info.unmatched, file).toEqual([]);
    expect(info.matched, file).toBe(tensors.length);
  }
}

/** The inputs of the base case, with a stack. */
const request = (model: KindsModel, loras: readonly LoraUse[]): StepRequest => ({
  ...requestOf(caseOf(readFixture(model), 'base')),
  loras,
});

const list = (errors: Readonly<Record<string, number>>): string =>
  Object.entries(errors)
    .map(([name, error]) => `${name} ${error.toExponential(1)}`)
    .join('; ');

describe.each(['sd1', 'sdxl'] as const)('adapter kinds on %s (software)', (model) => {
  const kinds = readKinds(model);

  describe.each(['f32', 'f16', 'q8_0'] as const)('in %s storage', (storage) => {
    let weights: readonly Uint8Array[];
    beforeAll(async () => {
      await open(engine, model, kinds, storage);
      weights = await engine.readWeights(model);
    });
    afterAll(() => engine.unloadModel(model));

    test('every file alone and every stack agrees with the reference', async () => {
      const errors: Record<string, number> = {};
      for (const [name, uses] of kinds.cases) {
        const out = await run(engine, model, [request(model, stack(...uses))]);
        errors[name] = normalisedError(out, kinds.output(name));
      }
      console.log(`${model} ${storage}: ${list(errors)}`);
      for (const [name, error] of Object.entries(errors))
        expect(error, name).toBeLessThan(TOLERANCE[storage]);
    });

    test('strength 0 of every file equals no adapter, bit for bit', async () => {
      const base = await run(engine, model, [request(model, [])]);
      for (const file of kinds.files)
        expect(await run(engine, model, [request(model, stack([file, 0]))]), file).toEqual(base);
      const all = stack(...kinds.files.map((file) => [file, 0] as const));
      expect(await run(engine, model, [request(model, all)])).toEqual(base);
    });

    test('a batch of mixed stacks equals as many single forwards, whatever the order', async () => {
      const rows = [...kinds.cases].map(([name, uses]) => ({ name, ...request(model, stack(...uses)) }));
      const inputs = rowsOf(requestOf(caseOf(readFixture(model), 'four')));
      const mixed = [
        [],
        ['everything', 'style', 'dora', 'norms'],
        ['glora, lora', 'glora, lora', 'boft', 'lokr'],
        ['set', 'fast', 'everything', 'all sums'],
      ];
      for (const names of mixed) {
        const requests = inputs.map((input, i) => ({
          ...input,
          loras: rows.find(({ name }) => name === names[i])?.loras ?? [],
        }));
        const together = await run(engine, model, requests);
        const alone = await Promise.all(requests.map((one) => run(engine, model, [one])));
        const singles = Float32Array.from(alone.flatMap((out) => [...out]));
        expect(normalisedError(together, singles), names.join(' | ')).toBeLessThan(1e-6);
        const reversed = await run(engine, model, [...requests].reverse());
        expect(
          normalisedError(reversed, Float32Array.from([...alone].reverse().flatMap((o) => [...o]))),
        ).toBeLessThan(1e-6);
      }
    });

    test('all of them leave every weight as it was, bit for bit', async () => {
      const after = await engine.readWeights(model);
      expect(after.every((bytes, i) => Buffer.compare(bytes, weights[i]!) === 0)).toBe(true);
      const base = caseOf(readFixture(model), 'base');
      const out = await run(engine, model, [request(model, [])]);
      const error = normalisedError(out, readFixture(model).tensor(base.output).data);
      expect(error).toBeLessThan(TOLERANCE[storage]);
    });
  });
});

describe('patched weights in an engine (software)', () => {
  const kinds = readKinds('sd1');

  test('stay within the budget of adapters, and do not grow from stack to stack', async () => {
    const adapterBudgetBytes = 6 * 1024 * 1024;
    const small = await Engine.create({ adapterBudgetBytes });
    const cases = ['dora', 'everything', 'all sums', 'boft', 'set', 'glora, lora'];
    await open(small, 'sd1', kinds, 'f32');
    const round = async (): Promise<number> => {
      for (const name of cases) {
        const out = await run(small, 'sd1', [request('sd1', stack(...kinds.cases.get(name)!))]);
        expect(normalisedError(out, kinds.output(name)), name).toBeLessThan(TOLERANCE.f32);
      }
      return (await small.stats()).memory.adapterBytes;
    };
    // Once for the adapters, once for what they patch.
    for (let i = 0; i < 3; i++) expect(await round()).toBeLessThanOrEqual(2 * adapterBudgetBytes);
    await small.close();
  });

  test('have the bias that PEFT states, as a difference of the bias would give it', async () => {
    await engine.loadModel(modelFile(folder, readFixture('sd1')), 'f32');
    const { id, stem } = { id: 'middle_block.1.proj_out', stem: 'unet.mid_block.attentions.0.proj_out' };
    const channels = readFixture('sd1').metadata.tensors[`${id}.weight`]![0]!;
    const values = Float32Array.from({ length: channels * 4 }, (_, i) => Math.sin(i) / 4);
    const write = async (name: string, parts: Readonly<Record<string, readonly number[]>>): Promise<void> => {
      const tensors = Object.entries(parts).map(([key, shape]) => {
        const size = shape.reduce((product, n) => product * n, 1);
        const from = key.endsWith('alpha') ? Float32Array.of(3) : values.slice(0, size);
        return { name: key, dtype: 'F32' as const, shape, data: new Uint8Array(from.buffer) };
      });
      const source = sourceOf(folder, name);
      writeFileSync(source.path, encode(tensors));
      await engine.loadAdapter(source, 'sd1');
    };
    const matrices = {
      [`${stem}.lora_A.weight`]: [4, channels, 1, 1],
      [`${stem}.lora_B.weight`]: [channels, 4, 1, 1],
      [`${stem}.alpha`]: [],
    };
    await write('plain', matrices);
    await write('biased', { ...matrices, [`${stem}.lora_B.bias`]: [channels] });
    await write('difference', { [`diffusion_model.${id}.diff_b`]: [channels] });
    const forward = (...uses: readonly (readonly [string, number])[]): Promise<Float32Array> =>
      run(engine, 'sd1', [request('sd1', stack(...uses))]);
    const biased = await forward(['biased', 0.5]);
    // alpha / rank is 3 / 4.
    expect(normalisedError(biased, await forward(['plain', 0.5], ['difference', 0.375]))).toBeLessThan(1e-6);
    expect(normalisedError(biased, await forward(['plain', 0.5]))).toBeGreaterThan(1e-3);
    await engine.unloadModel('sd1');
  });
});
