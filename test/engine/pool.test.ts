/**
 * Rung `software`: more adapters than the pool holds, in whole bindings and in small ones. Each result is that of an engine
 * without limits, whoever had to make room, and steps go on while an adapter is read. Who waits for whom is
 * test/lora/registry.test.ts, the allocator test/lora/pool.test.ts.
 */
import { writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { EngineOptions, FileSource, StepRequest } from '../../src/engine/types.ts';
import { encode } from '../../src/safetensors.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { layersOf } from '../../src/unet/layers.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { readKinds } from '../fixtures/kinds.ts';
import { writeAdapter } from '../lora/files.ts';
import { normalisedError } from '../unet/whole.ts';
import { modelFile, rowsOfCase, run, sourceOf, stack, temporaryFolder } from './setting.ts';

const [folder, remove] = temporaryFolder();
const fixture = readFixture('sd1');
const model = modelFile(folder, fixture, 'model');
const base = rowsOfCase(fixture, 'base')[0]!;
const LAYERS = layersOf(detectUNet(new Map(Object.entries(fixture.metadata.tensors))));
const kinds = readKinds('sd1');
afterAll(remove);

const withAll = (loras: readonly string[]): StepRequest => ({
  ...base,
  loras: stack(...loras.map((lora) => [lora, 0.6] as const)),
});

function lowRank(name: string, rank: number, ids: RegExp): FileSource {
  const source = sourceOf(folder, name);
  writeAdapter(source.path, name, LAYERS, rank, ids);
  return source;
}

/** One of the kinds that patch weights. */
function patching(file: string): FileSource {
  const source = sourceOf(folder, file);
  const tensors = kinds.tensorsOf(file).map(({ key, shape, values }) => ({
    name: key,
    dtype: 'F32' as const,
    shape,
    data: new Uint8Array(values.buffer),
  }));
  writeFileSync(source.path, encode(tensors));
  return source;
}

async function engineWith(options: EngineOptions, sources: readonly FileSource[]): Promise<Engine> {
  const engine = await Engine.create(options);
  await engine.loadModel(model, 'f32');
  for (const source of sources) await engine.loadAdapter(source, 'model');
  return engine;
}

async function sizesOf(engine: Engine): Promise<ReadonlyMap<string, number>> {
  const [info] = (await engine.stats()).models;
  return new Map(info!.adapters.map(({ lora, sizeBytes }) => [lora, sizeBytes]));
}

const sumOf = (sizes: ReadonlyMap<string, number>, names: readonly string[]): number =>
  [...new Set(names)].reduce((sum, name) => sum + sizes.get(name)!, 0);

describe('adapters of many ranks and kinds, in room for the largest stack (software)', () => {
  const RANKS = [1, 4, 7, 8, 9, 16, 32, 3, 24, 12];
  const IDS = [/attn1|attn2/, /attn1.*to_[qkv]$/, /attn2.*to_v$/, /in_layers|out_layers/];
  const PATCHING = ['dora', 'norms'];
  const sources = [
    ...RANKS.map((rank, i) => lowRank(`many-${i}`, rank, IDS[i % IDS.length]!)),
    ...PATCHING.map(patching),
  ];
  const names = sources.map(({ name }) => name);
  const stacks = names.map((name, i) => [name, names[(i * 5 + 3) % names.length]!]);
  const expected = new Map<readonly string[], Float32Array>();
  let adapterBudgetBytes = 0;
  beforeAll(async () => {
    const engine = await engineWith({}, sources);
    for (const each of stacks) expected.set(each, await run(engine, 'model', [withAll(each)]));
    const sizes = await sizesOf(engine);
    adapterBudgetBytes = Math.max(...stacks.map((each) => sumOf(sizes, each)));
    expect(adapterBudgetBytes).toBeLessThan(sumOf(sizes, names) / 2);
    await engine.close();
  });

  // The pool is cut into 12 and 44 pages. Smaller bindings than 1.25 MiB do not hold what patching works in.
  test.each([
    ['the largest bindings', undefined, stacks],
    ['bindings of 1.25 MiB', 1.25 * 1024 ** 2, stacks],
    [
      'bindings of 310 KiB',
      310 * 1024,
      stacks.filter((each) => !each.some((name) => PATCHING.includes(name))),
    ],
  ])('changes no result, in %s', async (_, maxBindingBytes, used) => {
    const limits = maxBindingBytes === undefined ? {} : { maxBindingBytes };
    const engine = await engineWith({ ...limits, adapterBudgetBytes }, sources);
    for (let round = 0; round < 3; round++) {
      // Several at once, so that reading, placing and stepping meet in every order.
      const order = used.map((_each, i) => used[(i * 7 + round) % used.length]!);
      const outs = await Promise.all(
        order.map(async (each) => {
          await engine.readyAdapters('model', each);
          return run(engine, 'model', [withAll(each)]);
        }),
      );
      // Cut weights and tiles are summed in another order; another adapter is a thousand times as far off.
      for (const [at, each] of order.entries())
        expect(normalisedError(outs[at]!, expected.get(each)!), each.join()).toBeLessThan(1e-6);
      const sizes = await sizesOf(engine);
      expect(sumOf(sizes, [...sizes.keys()])).toBeLessThanOrEqual(adapterBudgetBytes);
    }
    expect((await engine.stats()).turnover.adapterEvictions).toBeGreaterThan(used.length);
    await engine.close();
  });

  test('are told apart by these checks', () => {
    const outs = [...expected.values()];
    for (const [i, out] of outs.entries())
      for (const other of outs.slice(i + 1)) expect(normalisedError(out, other)).toBeGreaterThan(1e-3);
  });
});

describe('a pool with room in pieces (software)', () => {
  test('takes a stack that fits it, though one of the stack lies in the middle', async () => {
    const ids = /input_blocks\.1\.1\.transformer_blocks\.0\.ff\.net\.0\.proj$/;
    const [first, middle, large] = [
      lowRank('first', 32, ids),
      lowRank('middle', 8, ids),
      lowRank('large', 64, ids),
    ];
    const unlimited = await engineWith({}, [first, middle, large]);
    const expected = await run(unlimited, 'model', [withAll(['middle', 'large'])]);
    const adapterBudgetBytes = sumOf(await sizesOf(unlimited), ['middle', 'large']);
    await unlimited.close();
    // `middle` lies behind `first`; without `first`, no hole is as long as `large`.
    const engine = await engineWith({ adapterBudgetBytes }, [first, middle]);
    await engine.loadAdapter(large, 'model');
    await run(engine, 'model', [withAll(['first', 'middle'])]);
    expect(await run(engine, 'model', [withAll(['middle', 'large'])])).toEqual(expected);
    expect((await engine.stats()).memory.adapterBytes).toBeLessThanOrEqual(adapterBudgetBytes);
    await engine.close();
  });
});

describe('one adapter under two names (software)', () => {
  test('takes no more memory, and in a stack counts as often as it is named', async () => {
    const one = lowRank('one', 8, /attn1/);
    const engine = await engineWith({}, [one]);
    const expected = await run(engine, 'model', [withAll(['one', 'one'])]);
    const { memory } = await engine.stats();
    await engine.loadAdapter({ ...one, name: 'copy' }, 'model');
    expect(await run(engine, 'model', [withAll(['one', 'copy'])])).toEqual(expected);
    expect((await engine.stats()).memory).toEqual(memory);
    expect((await engine.stats()).turnover.adapterLoads).toBe(1);
    await engine.close();
  });
});

describe('steps beside an adapter that is read (software)', () => {
  test('go on, one after the other, until it is there', async () => {
    const large = lowRank('slow', 128, /./);
    const engine = await engineWith({}, []);
    await run(engine, 'model', [base]);
    let isLoading = true;
    const started = performance.now();
    const loaded = engine.loadAdapter(large, 'model').finally(() => {
      isLoading = false;
    });
    const steps: number[] = [];
    while (isLoading) {
      const begun = performance.now();
      await run(engine, 'model', [base]);
      steps.push(performance.now() - begun);
    }
    await loaded;
    const loadMs = performance.now() - started;
    const longest = Math.max(...steps);
    console.log(
      `${steps.length} steps in the ${loadMs.toFixed(0)} ms of a load, the longest ${longest.toFixed(0)} ms`,
    );
    expect(steps.length).toBeGreaterThan(2);
    expect(longest).toBeLessThan(loadMs / 2);
    await engine.close();
  });
});
