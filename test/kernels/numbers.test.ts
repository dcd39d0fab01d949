/**
 * Every case in every variant the device runs and in both storages, against its f64 reference. The rung is `software` on
 * lavapipe and `gpu` on a GPU. Compiling without a driver is null.test.ts. UNETD_VARIANTS: only what it matches of
 * `KERNEL VARIANT`.
 */
import { afterAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/gpu/device.ts';
import { type Kernel, runsOn, type Storage } from '../../src/gpu/kernel.ts';
import { KERNELS } from '../../src/kernels/index.ts';
import { type Case, SEED } from './case.ts';
import { CASES, variantsOf } from './cases.ts';
import { difference } from './compare.ts';
import { runCase } from './run.ts';

const STORAGES = ['f32', 'f16'] as const;
const WANTED = new RegExp(process.env.UNETD_VARIANTS ?? '');
const wanted = (kernel: Kernel) => (variant: string) => WANTED.test(`${kernel.name} ${variant}`);

const device = await Device.open().catch((error: Error) => {
  console.log(`[numbers] no device, all numbers are skipped: ${error.message}`);
  return undefined;
});
const rung = device?.capabilities.software === false ? 'gpu' : 'software';

afterAll(() => device?.close());

/** Without a device, what any would run. */
const able = (kernel: Kernel, variant: string, storage: Storage): boolean =>
  device === undefined || runsOn(kernel.variants[variant]!, device.capabilities, storage);

async function check(one: Case, variant: string, storage: Storage): Promise<void> {
  const built = one.build(storage, variant);
  const { outputs, damaged } = await runCase(device!, built, storage, variant);
  const problems = damaged.map((name) => `bytes around or inside ${name} were overwritten`);
  for (const [name, { expected, tolerance }] of Object.entries(built.outputs)) {
    if (!expected || !tolerance) continue;
    const problem = difference(name, outputs[name]!, expected(), tolerance);
    if (problem) problems.push(problem);
  }
  expect(problems, `seed ${SEED} (UNETD_SEED)`).toEqual([]);
}

describe.skipIf(!device)(`${rung} rung: kernels compute what their f64 references say`, () => {
  for (const one of CASES)
    for (const variant of variantsOf(one).filter(wanted(one.kernel)))
      for (const storage of one.storages ?? STORAGES)
        if (able(one.kernel, variant, storage))
          test(`${one.kernel.name} ${variant} ${storage}: ${one.name}`, () => check(one, variant, storage));

  for (const kernel of KERNELS)
    for (const variant of Object.keys(kernel.variants).filter(wanted(kernel)))
      if (!STORAGES.some((storage) => able(kernel, variant, storage)))
        test.skip(`${kernel.name} ${variant}: all cases, for which this adapter lacks subgroups or matrix units`, () => {});
});
