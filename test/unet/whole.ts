/** Runs whole UNets for the tests: a checkpoint from a fixture's weights, a device, a forward with every block captured. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { feedsOf, shapeOf } from '../../src/engine/batch.ts';
import type { StepRequest, TensorData } from '../../src/engine/types.ts';
import { Arena } from '../../src/gpu/arena.ts';
import type { Device } from '../../src/gpu/device.ts';
import type { Capabilities, Storage } from '../../src/gpu/kernel.ts';
import { Plan } from '../../src/gpu/plan.ts';
import { toF32 } from '../../src/half.ts';
import { gemmChoice } from '../../src/kernels/split_k.ts';
import { SafetensorsFile } from '../../src/safetensors.ts';
import type { UNetConfig } from '../../src/unet/config.ts';
import { inspectUNet } from '../../src/unet/detect.ts';
import { planUNet } from '../../src/unet/plan.ts';
import { Weights } from '../../src/unet/weights.ts';
import { type Case, type Fixture, type Generated, generated } from '../fixtures/fixture.ts';
import { writeCheckpoint } from '../fixtures/weights.ts';

export interface Compared {
  readonly name: string;
  /** ||out - ref|| / ||ref|| */
  readonly error: number;
}

/**
 * Largest normalised error of a whole forward. f16 rounds every activation: PyTorch's own f16 is off by 1.4e-3 to 2.7e-3.
 * q8_0 rounds every weight to a 254th of the span of the 32 it is with: of uniform ones, 4.5e-3 of their size.
 */
export const TOLERANCE = { f32: 1e-4, f16: 5e-3, q8_0: 2e-2 } as const;

/** Normalised error; NaN or Infinity anywhere in `out` gives Infinity. */
export function normalisedError(out: Float32Array, ref: Float32Array): number {
  if (out.length !== ref.length) throw new RangeError(`compared ${out.length} values with ${ref.length}`);
  let difference = 0;
  let norm = 0;
  out.forEach((value, i) => {
    difference += Number.isFinite(value) ? (value - ref[i]!) ** 2 : Number.POSITIVE_INFINITY;
    norm += ref[i]! ** 2;
  });
  return Math.sqrt(difference / norm);
}

const f32 = (shape: readonly number[], values: Float32Array): TensorData => ({
  dtype: 'F32',
  shape,
  data: new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
});

const input = (tensor: Generated): TensorData => f32(tensor.shape, generated(tensor));

/** The request of a fixture's case, without its LoRAs. */
export function requestOf({ inputs, timesteps, batch, control }: Case): StepRequest {
  const lists = control && {
    input: control.input.map((t) => t && input(t)),
    middle: control.middle.map((t) => t && input(t)),
    output: control.output.map((t) => t && input(t)),
  };
  return {
    loras: [],
    x: input(inputs.x),
    timesteps: f32([batch], Float32Array.from(timesteps)),
    context: input(inputs.context),
    ...(inputs.y ? { y: input(inputs.y) } : {}),
    ...(lists ? { control: lists } : {}),
  };
}

/** Writes a fixture's checkpoint into a temporary folder, removed by the returned function. */
export function checkpointOf(fixture: Fixture, dtype: 'F32' | 'F16' | 'BF16' = 'F16'): [string, () => void] {
  const folder = mkdtempSync(join(tmpdir(), 'unetd-test-'));
  const path = join(folder, 'model.safetensors');
  writeCheckpoint(path, fixture.metadata.tensors, { dtype, layout: 'ldm' });
  return [path, () => rmSync(folder, { recursive: true })];
}

/** Loads a checkpoint as the engine does. */
export async function loadWeights(
  device: Device,
  storage: Storage,
  path: string,
): Promise<{ config: UNetConfig; weights: Weights }> {
  const file = await SafetensorsFile.open(path);
  try {
    const shapes = new Map([...file.tensors].map(([name, { shape }]) => [name, shape]));
    const { config, sources } = inspectUNet(shapes);
    const entryOf = (name: string) => file.tensors.get(sources.get(name)!)!;
    return { config, weights: await Weights.load(device, storage, config, file, entryOf) };
  } finally {
    await file.close();
  }
}

/**
 * Runs one case with every block captured and compares in the order of computation; `out` is the last. Kernels are chosen for
 * `capabilities`, GEMMs by `choose`.
 */
export async function compareBlocks(
  device: Device,
  storage: Storage,
  model: { config: UNetConfig; weights: Weights },
  fixture: Fixture,
  which: Case,
  capabilities: Capabilities = device.capabilities,
  choose: typeof gemmChoice = gemmChoice,
): Promise<readonly Compared[]> {
  const request = requestOf(which);
  const { config, weights } = model;
  const shape = shapeOf([request]);
  const options = { storage, capabilities, weights, choose, lora: undefined, capture: true };
  const unet = planUNet(config, shape, options);
  const arena = new Arena(device, 'test arena');
  const plan = await Plan.compile(device, arena, unet.spec);
  await arena.ensure(plan.arenaBytes);
  const { x, time, context, y, control } = unet.feeds;
  const targets = { x, time, context, ...(y ? { y } : {}) };
  const feeds = feedsOf(config, storage, [request]);
  for (const [name, tensor] of Object.entries(targets)) plan.write(tensor, feeds.get(name)!);
  for (const [name, tensor] of control) plan.write(tensor, feeds.get(`control.${name}`)!);
  await device.guarded('test', () => {
    const encoder = device.gpu.createCommandEncoder();
    plan.encode(encoder);
    device.gpu.queue.submit([encoder.finish()]);
  });
  await device.settle(() => device.gpu.queue.onSubmittedWorkDone());
  const compared: Compared[] = [];
  for (const [name, point] of unet.points) {
    const stored = which.captures[name];
    if (stored === undefined) continue;
    const ref = fixture.tensor(stored).data;
    const values = await device.read(arena.buffer, plan.offsetOf(point.tensor), point.tensor.sizeBytes);
    const nhwc = toF32(storage === 'f16' && !point.tensor.wide ? 'F16' : 'F32', values);
    const silu = name === 'emb' ? ref.map((v) => v / (1 + Math.exp(-v))) : ref;
    compared.push({
      name,
      error: normalisedError(toNchw(nhwc, which.batch, point.channels, silu.length), silu),
    });
  }
  const out = await device.read(
    arena.buffer,
    plan.offsetOf(unet.out),
    fixture.tensor(which.output).data.byteLength,
  );
  compared.push({
    name: 'out',
    error: normalisedError(toF32('F32', out), fixture.tensor(which.output).data),
  });
  plan.close();
  arena.close();
  return compared;
}

function toNchw(nhwc: Float32Array, images: number, channels: number, length: number): Float32Array {
  const out = new Float32Array(length);
  const tokens = length / images / channels;
  for (let n = 0; n < images; n++)
    for (let t = 0; t < tokens; t++)
      for (let c = 0; c < channels; c++)
        out[(n * channels + c) * tokens + t] = nhwc[(n * tokens + t) * channels + c]!;
  return out;
}

/** One request per image of a request. */
export function rowsOf(request: StepRequest): readonly StepRequest[] {
  const images = request.x.shape[0] ?? 0;
  const row = (tensor: TensorData, i: number): TensorData => {
    const size = tensor.data.byteLength / images;
    return {
      ...tensor,
      shape: [1, ...tensor.shape.slice(1)],
      data: tensor.data.subarray(i * size, (i + 1) * size),
    };
  };
  const list = (tensors: readonly (TensorData | null)[] | undefined, i: number) =>
    (tensors ?? []).map((tensor) => tensor && row(tensor, i));
  return Array.from({ length: images }, (_, i) => ({
    loras: request.loras,
    x: row(request.x, i),
    timesteps: row(request.timesteps, i),
    context: row(request.context, i),
    ...(request.y ? { y: row(request.y, i) } : {}),
    ...(request.control
      ? {
          control: {
            input: list(request.control.input, i),
            middle: list(request.control.middle, i),
            output: list(request.control.output, i),
          },
        }
      : {}),
  }));
}
