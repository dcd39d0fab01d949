/**
 * Rung `software`, outside CI: the full-size SD 1.5 and SDXL UNets against PyTorch, with random weights that both sides make
 * from the same generator. References are made by `test/reference/generate.py --full` (see `npm run test:full`).
 */
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import { toF32 } from '../../src/half.ts';
import { readFixtureFile, writeLora } from '../fixtures/fixture.ts';
import { writeCheckpoint } from '../fixtures/weights.ts';
import { normalisedError, requestOf, TOLERANCE } from '../unet/whole.ts';

const reference = (name: string): string =>
  fileURLToPath(new URL(`../../.cache/reference/${name}.safetensors`, import.meta.url));

describe.each(['sd15', 'sdxl'])('full-size %s (software)', (name) => {
  if (!existsSync(reference(name))) throw new Error(`${reference(name)} is missing; run "npm run test:full"`);
  const folder = mkdtempSync(join(tmpdir(), 'unetd-full-'));
  const path = join(folder, `${name}.safetensors`);
  const fixture = readFixtureFile(reference(name));

  beforeAll(() => {
    writeCheckpoint(path, fixture.metadata.tensors, { dtype: 'F16', layout: 'ldm' });
    for (const file of Object.keys(fixture.metadata.loras))
      writeLora(join(folder, `${file}.safetensors`), fixture, file);
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  test.each(['f16', 'f32'] as const)('loads and agrees with the reference in %s storage', async (storage) => {
    const engine = await Engine.create();
    const started = performance.now();
    const info = await engine.loadModel({ name, path, version: '1' }, storage);
    const loadMs = performance.now() - started;
    for (const file of Object.keys(fixture.metadata.loras))
      await engine.loadAdapter({ name: file, path: join(folder, `${file}.safetensors`), version: '1' }, name);
    const errors: [string, number][] = [];
    for (const which of fixture.metadata.cases) {
      const loras = (which.adapters[0] ?? []).map(([lora, strength]) => ({ lora, strength }));
      const { outs, gpuMs } = await engine.forward({
        model: name,
        requests: [{ ...requestOf(which), loras }],
      });
      const error = normalisedError(toF32('F32', outs[0]!.data), fixture.tensor(which.output).data);
      errors.push([which.name, error]);
      const size = `${which.batch}x${which.height}x${which.width}`;
      console.log(
        `${name} ${storage} ${which.name} ${size}: error ${error.toExponential(2)}, ${(gpuMs / 1000).toFixed(2)} s`,
      );
    }
    await engine.close();
    const ratio = info.sizeBytes / (fixture.metadata.parameters * (storage === 'f16' ? 2 : 4));
    console.log(
      `${name} ${storage}: loaded in ${(loadMs / 1000).toFixed(1)} s, weights ${(info.sizeBytes / 1e9).toFixed(3)} GB, ${ratio.toFixed(4)} of the tensors' bytes`,
    );
    expect(ratio).toBeLessThan(1.03);
    for (const [which, error] of errors) expect(error, which).toBeLessThan(TOLERANCE[storage]);
  });
});
