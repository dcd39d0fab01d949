/**
 * Rung `null`: the plans of the real, full-size UNets compile and record on a device that has no more than WebGPU's
 * default limits, and how many dispatches and bytes they take. No weights, no numbers.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Arena } from '../../src/gpu/arena.ts';
import { Device, Usage } from '../../src/gpu/device.ts';
import type { Resident } from '../../src/gpu/kernel.ts';
import { Plan } from '../../src/gpu/plan.ts';
import { dispatchesOf, plainDispatchesOf } from '../../src/gpu/spec.ts';
import { gemmReduce } from '../../src/kernels/split_k.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { planUNet, type UNetPlan } from '../../src/unet/plan.ts';
import { type Model, shapesOf } from '../fixtures/shapes/load.ts';
import { standInWeights } from './stand-in.ts';

/**
 * Model, latent size, and the most that a forward may take without LoRA: dispatches, those besides that add the parts of a cut
 * K, and MiB of arena. A device that has no more than the guaranteed 256 MiB in one buffer runs the larger ones one image at a
 * time.
 */
const PLANS: readonly (readonly [
  model: Model,
  size: number,
  dispatches: number,
  reduces: number,
  arenaMiB: number,
])[] = [
  ['sd15', 64, 417, 47, 76],
  ['sd15-inpaint', 64, 417, 47, 76],
  ['sd21', 64, 417, 47, 76],
  ['sdxl', 128, 953, 8, 281],
  ['sdxl-inpaint', 128, 953, 8, 281],
  ['sdxl-refiner', 128, 702, 25, 337],
  ['ssd-1b', 128, 546, 8, 281],
  ['vega', 128, 337, 8, 281],
  ['koala-700m', 128, 339, 6, 241],
  ['koala-1b', 128, 454, 6, 241],
];
const IMAGES = 2;
/** What WebGPU guarantees everywhere. */
const DEFAULT_BINDING = 128 * 1024 * 1024;
const MiB = 1024 * 1024;

let device: Device;
let read: GPUBuffer;
let written: GPUBuffer;
beforeAll(async () => {
  device = await Device.open({ backend: 'null', defaultLimits: true });
  read = device.createBuffer('stand-in', DEFAULT_BINDING, Usage.STORAGE);
  written = device.createBuffer('stand-in', 4096, Usage.STORAGE);
});
afterAll(() => device.close());

/** Something bound; the null backend never looks inside. */
const standIn = (sizeBytes: number, current: () => GPUBuffer = () => read): Resident => ({
  kind: 'resident',
  label: 'stand-in',
  current,
  offset: 0,
  sizeBytes,
});

function planOf(model: Model, size: number, images: number): UNetPlan {
  const config = detectUNet(shapesOf(model));
  const weights = standInWeights(config, 'f16', device.capabilities, { matrix: standIn, vector: standIn });
  const shape = { images, height: size, width: size, contextTokens: 77, control: {} };
  const lora = (slot: number) => ({
    slot,
    pool: standIn(0),
    table: standIn(4096),
    t: standIn(0, () => written),
  });
  return planUNet(config, shape, { storage: 'f16', capabilities: device.capabilities, weights, lora });
}

/** Most bytes that any operand of the plan binds. */
function largestBinding({ spec }: UNetPlan): number {
  const dispatches = spec.steps.flatMap(dispatchesOf);
  return Math.max(
    ...dispatches.flatMap(({ operands }) => Object.values(operands).map(({ sizeBytes }) => sizeBytes)),
  );
}

describe('full-size plans (null)', () => {
  test('are tried on a device with the limits of the specification', () => {
    expect(device.gpu.limits).toMatchObject({
      maxStorageBufferBindingSize: DEFAULT_BINDING,
      maxStorageBuffersPerShaderStage: 8,
      maxComputeWorkgroupStorageSize: 16384,
      maxComputeInvocationsPerWorkgroup: 256,
    });
  });

  test.each(PLANS)(
    '%s at a latent size of %i compiles and records, LoRA in every layer included',
    async (model, size, dispatches, reduces, arenaMiB) => {
      const unet = planOf(model, size, IMAGES);
      const arena = new Arena(device, 'plan test');
      const plan = await Plan.compile(device, arena, unet.spec);
      const ratio = plan.arenaBytes / plan.lowerBoundBytes;
      const ends = unet.spec.steps
        .flatMap(plainDispatchesOf)
        .filter(({ kernel }) => kernel === gemmReduce).length;
      const isOneBuffer = plan.arenaBytes <= device.capabilities.maxBufferBytes;
      console.log(
        `${model} ${IMAGES}x${size}x${size} f16: ${plan.dispatchCount - ends} dispatches and ${ends} of parts of K, arena ${(plan.arenaBytes / MiB).toFixed(1)} MiB, ` +
          `${ratio.toFixed(3)} of the least, largest binding ${(largestBinding(unet) / MiB).toFixed(1)} MiB` +
          `${isOneBuffer ? '' : '; more than the guaranteed 256 MiB in a buffer, so recorded with one image'}`,
      );
      const recorded = isOneBuffer ? plan : await Plan.compile(device, arena, planOf(model, size, 1).spec);
      await arena.ensure(recorded.arenaBytes);
      for (const blocks of [0, 3])
        await device.guarded(`${model} with ${blocks} blocks`, () => {
          const encoder = device.gpu.createCommandEncoder();
          recorded.encode(encoder, { blocks: () => blocks });
          device.gpu.queue.submit([encoder.finish()]);
        });
      await device.settle(() => device.gpu.queue.onSubmittedWorkDone());
      arena.close();
      expect(plan.dispatchCount - ends).toBeLessThanOrEqual(dispatches);
      expect(ends).toBeLessThanOrEqual(reduces);
      expect(plan.arenaBytes / MiB).toBeLessThanOrEqual(arenaMiB);
      expect(ratio).toBeLessThanOrEqual(1.3);
    },
  );
});
