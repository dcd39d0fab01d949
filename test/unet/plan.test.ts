/**
 * Rung `null`: the plans of the real, full-size UNets compile and record on a device that has no more than WebGPU's
 * default limits (but for the size of the arena), and how many dispatches and bytes they take. No weights, no numbers.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Arena } from '../../src/gpu/arena.ts';
import { Device, Usage } from '../../src/gpu/device.ts';
import type { Operand, Resident, Storage } from '../../src/gpu/kernel.ts';
import { Plan } from '../../src/gpu/plan.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import type { WeightSource } from '../../src/unet/draft.ts';
import { layersOf, partsOf } from '../../src/unet/layers.ts';
import { planUNet, type UNetPlan } from '../../src/unet/plan.ts';
import { type Model, shapesOf } from '../fixtures/shapes/load.ts';

/** Model, latent size, most dispatches of a forward without LoRA. */
const PLANS: readonly (readonly [model: Model, size: number, dispatches: number])[] = [
  ['sd15', 64, 650],
  ['sd15-inpaint', 64, 650],
  ['sd21', 64, 650],
  ['sdxl', 128, 1600],
  ['sdxl-inpaint', 128, 1600],
  ['sdxl-refiner', 128, 1100],
  ['ssd-1b', 128, 900],
  ['vega', 128, 600],
  ['koala-700m', 128, 650],
  ['koala-1b', 128, 900],
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
  read = device.createBuffer('stand-in', 64 * MiB, Usage.STORAGE);
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

function planOf(model: Model, size: number, storage: Storage): UNetPlan {
  const config = detectUNet(shapesOf(model));
  const parts = new Map(partsOf(config).map((part) => [part.id, part]));
  const slots = new Map(layersOf(config).map(({ id }, slot) => [id, slot]));
  const weights: WeightSource = {
    matrix: (id) => {
      const { inFeatures, outFeatures, kernel } = parts.get(id)!;
      const range = (_offset: number, sizeBytes: number): Operand => standIn(sizeBytes);
      return { slot: slots.get(id)!, inFeatures, outFeatures, kernel, range };
    },
    vector: (name) => {
      const part = parts.get(name.replace(/\.(weight|bias)$/, ''))!;
      if (name.endsWith('.bias') && !part.bias) return undefined;
      return standIn(Math.ceil(part.outFeatures / 8) * 8 * 4);
    },
  };
  const shape = { images: IMAGES, height: size, width: size, contextTokens: 77, control: {} };
  const lora = (slot: number) => ({
    slot,
    pool: standIn(0),
    table: standIn(4096),
    t: standIn(0, () => written),
  });
  return planUNet(config, shape, { storage, capabilities: device.capabilities, weights, lora });
}

/** Most bytes that any operand of the plan binds. */
function largestBinding({ spec }: UNetPlan): number {
  const dispatches = spec.steps.flatMap((step) =>
    step.kind === 'always' ? [step.dispatch] : [...step.base, step.down, ...step.main],
  );
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
    '%s at %i x %i compiles and records, LoRA in every layer included',
    async (model, size, most) => {
      const unet = planOf(model, size, 'f16');
      const arena = new Arena(device, 'plan test');
      const plan = await Plan.compile(device, arena, unet.spec);
      const ratio = plan.arenaBytes / plan.lowerBoundBytes;
      console.log(
        `${model} ${IMAGES}x${size}x${size} f16: ${plan.dispatchCount} dispatches, arena ${(plan.arenaBytes / MiB).toFixed(1)} MiB, ` +
          `${ratio.toFixed(3)} of the least, largest binding ${(largestBinding(unet) / MiB).toFixed(1)} MiB`,
      );
      await arena.ensure(plan.arenaBytes);
      for (const blocks of [0, 3])
        await device.guarded(`${model} with ${blocks} blocks`, () => {
          const encoder = device.gpu.createCommandEncoder();
          plan.encode(encoder, () => blocks);
          device.gpu.queue.submit([encoder.finish()]);
        });
      device.check();
      plan.close();
      arena.close();
      expect(plan.dispatchCount).toBeLessThanOrEqual(most);
      expect(ratio).toBeLessThanOrEqual(1.3);
    },
  );
});
