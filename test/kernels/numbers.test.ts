/**
 * Every case in every variant the device runs and in both storages, against its f64 reference. The rung is `software` on
 * lavapipe and `gpu` on a GPU. Compiling without a driver is null.test.ts.
 */
import { afterAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/gpu/device.ts';
import { SEED } from './case.ts';
import { CASES, variantsOf } from './cases.ts';
import { difference } from './compare.ts';
import { runCase } from './run.ts';

const device = await Device.open().catch((error: Error) => {
  console.log(`[numbers] no device, all numbers are skipped: ${error.message}`);
  return undefined;
});
const rung = device?.capabilities.software === false ? 'gpu' : 'software';

afterAll(() => device?.close());

describe.skipIf(!device)(`${rung} rung: kernels compute what their f64 references say`, () => {
  for (const one of CASES)
    for (const variant of variantsOf(one)) {
      const lanes = one.kernel.variants[variant]?.subgroupSize;
      const able = !lanes || lanes === device?.capabilities.subgroupSize;
      for (const storage of one.storages ?? (['f32', 'f16'] as const)) {
        test.skipIf(!able)(`${one.kernel.name} ${variant} ${storage}: ${one.name}`, async () => {
          const built = one.build(storage);
          const { outputs, damaged } = await runCase(device!, built, storage, variant);
          const problems = damaged.map((name) => `bytes around or inside ${name} were overwritten`);
          for (const [name, { expected, tolerance }] of Object.entries(built.outputs)) {
            if (!expected || !tolerance) continue;
            const problem = difference(name, outputs[name]!, expected(), tolerance);
            if (problem) problems.push(problem);
          }
          expect(problems, `seed ${SEED} (UNETD_SEED)`).toEqual([]);
        });
      }
    }
});
