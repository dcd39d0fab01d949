/**
 * The `null` rung: Dawn's null backend, which needs no driver, compiles and validates every module, and records every
 * case, within the limits that WebGPU guarantees. It executes nothing: numbers are numbers.test.ts.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { afterAll, describe, expect, test } from 'vitest';
import { matrixBCase, matrixCase } from '../../bench/matrix-peak.ts';
import { fmaCase, streamCase } from '../../bench/peak.ts';
import { Device } from '../../src/gpu/device.ts';
import { type Recipe, recipeKey } from '../../src/gpu/link.ts';
import { MATRIX_VARIANTS } from '../../src/kernels/matrix.ts';
import { CASES, variantsOf } from './cases.ts';
import { allRecipes } from './recipes.ts';
import { closePrepared, prepare } from './run.ts';

const device = await Device.open({ backend: 'null' });
afterAll(() => device.close());

const STORAGES = ['f32', 'f16'] as const;

/** Optional operands that a choice needs. */
const NEEDS: Readonly<Record<string, readonly string[]>> = {
  'a=concat': ['x2'],
  'lora=blocks': ['t', 'up', 'table'],
  'x=dense': ['x'],
  'x=blocks': ['blocks'],
  'x=product': ['x', 'right'],
};

function withChoice(recipe: Recipe, option: string, choice: string): Recipe {
  const before = NEEDS[`${option}=${recipe.choices[option]}`] ?? [];
  const kept = recipe.operandNames.filter((name) => !before.includes(name));
  const operandNames = [...kept, ...(NEEDS[`${option}=${choice}`] ?? [])];
  return { ...recipe, choices: { ...recipe.choices, [option]: choice }, operandNames };
}

/** The recipe with every choice of every option in turn, and with every value of its boolean constants. */
function* spread(recipe: Recipe): Generator<Recipe> {
  const { kernel, constants } = recipe;
  yield recipe;
  for (const [name, value] of Object.entries(kernel.constants))
    if (typeof value === 'boolean') yield { ...recipe, constants: { ...constants, [name]: !value } };
  for (const [option, choices] of Object.entries(kernel.options))
    for (const choice of kernel.variants[recipe.variant]?.choices?.[option] ?? Object.keys(choices)) {
      const other = withChoice(recipe, option, choice);
      // Low-rank terms, two sources, bias and add together need nine bindings; no layer has them all.
      if (other.operandNames.length <= device.gpu.limits.maxStorageBuffersPerShaderStage) yield other;
    }
}

describe('null rung: WebGPU as every implementation has it', () => {
  test('the device has no more than the guaranteed limits', () => {
    const { limits } = device.gpu;
    expect(limits.maxStorageBuffersPerShaderStage).toBe(8);
    expect(limits.maxComputeWorkgroupStorageSize).toBe(16384);
    expect(limits.maxComputeInvocationsPerWorkgroup).toBe(256);
    expect(limits.maxStorageBufferBindingSize).toBe(128 * 2 ** 20);
  });

  for (const storage of STORAGES)
    test(`every variant with every option compiles in ${storage}`, async () => {
      const recipes = new Map<string, Recipe>();
      for (const base of allRecipes().values())
        for (const recipe of spread(base)) recipes.set(recipeKey(recipe, storage), recipe);
      for (const recipe of recipes.values()) await device.pipelines.get(recipe, storage);
      device.check();
      console.log(`[null] ${recipes.size} modules compiled in ${storage}`);
    });

  test('the kernels of the benchmark compile and record', async () => {
    const onMatrices = MATRIX_VARIANTS.flatMap((variant) => [
      matrixCase(variant, 1, 1),
      ...[true, false].map((isStaged) => matrixBCase(variant, isStaged, [64, 32, 64])),
    ]);
    for (const one of [fmaCase(1, 1), streamCase(1), ...onMatrices])
      await device.guarded(one.name, async () =>
        closePrepared(await prepare(device, one.build('f32'), 'f32', undefined)),
      );
    device.check();
  });

  for (const storage of STORAGES)
    test(`every case records in every variant in ${storage}`, async () => {
      for (const one of CASES.filter((c) => c.storages?.includes(storage) ?? true))
        for (const variant of variantsOf(one)) {
          const what = `${one.kernel.name} ${variant} ${one.name}`;
          await device.guarded(what, async () => {
            const prepared = await prepare(device, one.build(storage), storage, variant);
            const encoder = device.gpu.createCommandEncoder();
            prepared.plan.encode(encoder);
            device.gpu.queue.submit([encoder.finish()]);
            closePrepared(prepared);
          });
        }
      device.check();
    });
});

describe('the WGSL sources', () => {
  const root = new URL('../../shaders/', import.meta.url);
  const files = readdirSync(root, { recursive: true })
    .map(String)
    .filter((name) => name.endsWith('.wgsl'));

  test('initialise every var inside a loop', () => {
    // Dawn 0.6.2 zeroes a `var` without initializer once per function instead of once per iteration (seen in the
    // SPIR-V it emits: an OpVariable with initializer, no OpStore in the loop). Can go when Dawn stores it.
    const found: string[] = [];
    for (const file of files) {
      let depth = 0;
      readFileSync(new URL(file, root), 'utf8')
        .split('\n')
        .forEach((line, i) => {
          const code = line.replace(/\/\/.*/, '');
          if (depth >= 2 && /\bvar\s+\w+\s*:[^=]*;/.test(code)) found.push(`${file}:${i + 1}`);
          depth += (code.match(/{/g)?.length ?? 0) - (code.match(/}/g)?.length ?? 0);
        });
    }
    expect(found).toEqual([]);
  });

  test('open with a comment and stay below 200 lines', () => {
    const bad = files.filter((file) => {
      const text = readFileSync(new URL(file, root), 'utf8');
      return !text.startsWith('// ') || text.split('\n').length > 200;
    });
    expect(bad).toEqual([]);
  });
});
