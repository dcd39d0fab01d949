/** Rung `software`: every architecture, block by block, against outputs of the reference implementation in PyTorch. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/gpu/device.ts';
import { ARCHITECTURES, caseOf, readFixture } from '../fixtures/fixture.ts';
import { checkpointOf, compareBlocks, loadWeights, TOLERANCE } from './whole.ts';

describe.each(ARCHITECTURES)('%s against the reference (software)', (architecture) => {
  const fixture = readFixture(architecture);
  let device: Device;

  beforeAll(async () => {
    device = await Device.open();
  });
  afterAll(() => device.close());

  test.each(['f32', 'f16'] as const)('every block of a forward in %s storage is right', async (storage) => {
    const [path, remove] = checkpointOf(fixture);
    const model = await loadWeights(device, storage, path);
    remove();
    const compared = await compareBlocks(device, storage, model, fixture, caseOf(fixture, 'base'));
    model.weights.close();
    expect(compared.length).toBeGreaterThan(Object.keys(caseOf(fixture, 'base').captures).length / 4);
    const wrong = compared.find(({ error }) => !(error <= TOLERANCE[storage]));
    expect(wrong, `the first wrong block of ${architecture}`).toBeUndefined();
  });

  test('the weights take at most 3 % more than their tensors in the storage dtype', async () => {
    const [path, remove] = checkpointOf(fixture);
    const { weights } = await loadWeights(device, 'f16', path);
    remove();
    const bytes = weights.sizeBytes;
    weights.close();
    expect(bytes / (fixture.metadata.parameters * 2)).toBeLessThan(1.03);
  });
});
