/**
 * UNets whose GEMMs cut K: which of them do, and (rung `software`) one whose GEMMs all do, block by block, against outputs of the
 * reference implementation in PyTorch. The rules never cut K on a software adapter; matrix.test.ts does it on matrix units.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/gpu/device.ts';
import type { Resident } from '../../src/gpu/kernel.ts';
import { dispatchesOf, plainDispatchesOf } from '../../src/gpu/spec.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { planUNet } from '../../src/unet/plan.ts';
import { caseOf, readFixture } from '../fixtures/fixture.ts';
import { shapesOf } from '../fixtures/shapes/load.ts';
import { GUARANTEED } from '../gpu/capabilities.ts';
import { standInWeights } from './stand-in.ts';
import { checkpointOf, compareBlocks, loadWeights, TOLERANCE } from './whole.ts';

const nowhere: Resident = {
  kind: 'resident',
  label: 'nowhere',
  current: () => {
    throw new Error('nothing is bound here');
  },
  offset: 0,
  sizeBytes: 0,
};

/** The steps of SD 1.5 at 64x64 latents on an adapter that has only what WebGPU guarantees. */
function stepsOf(images: number) {
  const config = detectUNet(shapesOf('sd15'));
  const stand = () => nowhere;
  const weights = standInWeights(config, 'f16', GUARANTEED, { matrix: stand, vector: stand });
  const lora = (slot: number) => ({ slot, pool: nowhere, table: nowhere, t: nowhere });
  const shape = { images, height: 64, width: 64, contextTokens: 77, control: {} };
  return planUNet(config, shape, { storage: 'f16', capabilities: GUARANTEED, weights, lora }).spec.steps;
}

const partsOfK = (images: number): readonly (number | undefined)[] =>
  stepsOf(images)
    .flatMap(dispatchesOf)
    .filter(({ kernel }) => kernel.name === 'gemm')
    .map(({ params }) => params.kSplits);

describe('the GEMMs of SD 1.5 that cut K', () => {
  test('are the same for one image and for many, so that a batch changes no image', () => {
    expect(partsOfK(1).some((parts = 1) => parts > 1)).toBe(true);
    expect(partsOfK(4)).toEqual(partsOfK(1));
  });

  test('cut it alike where a run without LoRA has layers of one tensor together', () => {
    const bundles = stepsOf(1).filter((step) => step.kind === 'bundle');
    expect(bundles.length).toBeGreaterThan(30);
    for (const bundle of bundles) {
      const parts = [...bundle.together, ...bundle.apart.flatMap(plainDispatchesOf)];
      expect(new Set(parts.map(({ params }) => params.kSplits)).size).toBe(1);
    }
  });

  test('are followed by what adds the parts up', () => {
    const dispatches = stepsOf(1).flatMap(plainDispatchesOf);
    dispatches.forEach(({ params, kernel, operands }, i) => {
      if (kernel.name !== 'gemm' || params.kSplits === 1) return;
      const next = dispatches[i + 1]!;
      expect(next.kernel.name).toBe('gemm_reduce');
      expect(next.operands.partials).toBe(operands.out);
    });
  });
});

describe('a forward that adds every GEMM up from three parts (software)', () => {
  const storage = 'f16';
  let device: Device;
  beforeAll(async () => {
    device = await Device.open();
  });
  afterAll(() => device.close());

  test('is right in every block', async () => {
    const fixture = readFixture('sd1');
    const [path, remove] = checkpointOf(fixture);
    const model = await loadWeights(device, storage, path);
    remove();
    const { capabilities } = device;
    const base = caseOf(fixture, 'base');
    const compared = await compareBlocks(device, storage, model, fixture, base, capabilities, () => ({
      variant: 'tile',
      splits: 3,
    }));
    model.weights.close();
    const wrong = compared.find(({ error }) => !(error <= TOLERANCE[storage]));
    expect(wrong, 'the first wrong block').toBeUndefined();
  });
});
