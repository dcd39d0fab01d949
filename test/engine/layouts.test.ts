/** Rung `software`: one UNet in every file layout and dtype, and requests in either dtype, give the same results. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import type { StepRequest, TensorData } from '../../src/engine/types.ts';
import { fromF32, toF32 } from '../../src/half.ts';
import { type Fixture, readFixture } from '../fixtures/fixture.ts';
import {
  type CheckpointOptions,
  type Entry,
  type StoredDtype,
  writeCheckpoint,
  writeTensors,
} from '../fixtures/weights.ts';
import { normalisedError } from '../unet/whole.ts';
import { rowsOfCase, run, sourceOf, temporaryFolder } from './setting.ts';

const [folder, remove] = temporaryFolder();
let engine: Engine;
beforeAll(async () => {
  engine = await Engine.create();
});
afterAll(async () => {
  await engine.close();
  remove();
});

/** The result of a request on the model in a file that `write` makes. */
async function resultOf(
  write: (path: string) => void,
  request: StepRequest,
  storage: 'f32' | 'f16' = 'f32',
): Promise<{ out: Float32Array; sizeBytes: number }> {
  const source = sourceOf(folder, 'model');
  write(source.path);
  const { sizeBytes } = await engine.loadModel(source, storage);
  const out = await run(engine, 'model', [request]);
  await engine.unloadModel('model');
  return { out, sizeBytes };
}

const half = ({ shape, data }: TensorData): TensorData => ({
  dtype: 'F16',
  shape,
  data: fromF32('F16', toF32('F32', data)),
});

/** What an f16 tensor holds, as f32. */
const widened = (tensor: TensorData): TensorData => {
  const { shape, data } = half(tensor);
  return { dtype: 'F32', shape, data: new Uint8Array(toF32('F16', data).buffer) };
};

/** A request with every tensor but the timesteps passed through `change`. */
function changed(request: StepRequest, change: (tensor: TensorData) => TensorData): StepRequest {
  const { x, context, y, control } = request;
  const list = (tensors: readonly (TensorData | null)[] | undefined) =>
    (tensors ?? []).map((tensor) => tensor && change(tensor));
  return {
    ...request,
    x: change(x),
    context: change(context),
    ...(y ? { y: change(y) } : {}),
    ...(control
      ? {
          control: {
            input: list(control.input),
            middle: list(control.middle),
            output: list(control.output),
          },
        }
      : {}),
  };
}

const checkpoint =
  ({ metadata }: Fixture, dtype: StoredDtype, layout: CheckpointOptions['layout']) =>
  (path: string): void =>
    writeCheckpoint(path, metadata.tensors, { dtype, layout, diffusers: metadata.diffusers });

/** The checkpoint of a whole pipeline: what other programs save beside the UNet. */
function pipeline({ metadata }: Fixture, path: string): void {
  const shapes: Record<string, readonly number[]> = {
    'cond_stage_model.transformer.text_model.embeddings.token_embedding.weight': [77, 48],
    'cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight': [192, 48],
    'first_stage_model.decoder.conv_in.weight': [64, 4, 3, 3],
    'first_stage_model.encoder.down.0.block.0.conv1.weight': [32, 32, 3, 3],
    'model_ema.decay': [1],
    'model_ema.diffusion_modelinput_blocks00weight': [32, 4, 3, 3],
    alphas_cumprod: [1000],
  };
  const others = Object.entries(shapes).map(
    ([key, shape]): Entry => ({
      key,
      shape,
      from: new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(1),
    }),
  );
  const unet = Object.entries(metadata.tensors).map(
    ([name, shape]): Entry => ({ key: `model.diffusion_model.${name}`, shape, from: name }),
  );
  writeTensors(path, [...others.slice(0, 3), ...unet, ...others.slice(3)], 'F16');
}

describe.each(['sd1', 'sdxl'] as const)('one UNet of %s in other files (software)', (architecture) => {
  const fixture = readFixture(architecture);
  const request = rowsOfCase(fixture, 'base')[0]!;
  let expected: { out: Float32Array; sizeBytes: number };
  beforeAll(async () => {
    expected = await resultOf(checkpoint(fixture, 'F32', 'bare'), request);
  });

  test.each([
    ['F16', 'bare'],
    ['BF16', 'ldm'],
    ['F32', 'ldm'],
    ['F16', 'diffusers'],
    ['BF16', 'diffusers'],
  ] as const)('as %s in the %s layout gives the same bits', async (dtype, layout) => {
    expect(await resultOf(checkpoint(fixture, dtype, layout), request)).toEqual(expected);
  });

  test('beside a VAE, a text encoder and averaged weights takes the same memory and gives the same bits', async () => {
    expect(await resultOf((path) => pipeline(fixture, path), request)).toEqual(expected);
  });

  test('in f16 storage gives the same bits from every dtype', async () => {
    const one = await resultOf(checkpoint(fixture, 'F16', 'ldm'), request, 'f16');
    expect(await resultOf(checkpoint(fixture, 'F32', 'ldm'), request, 'f16')).toEqual(one);
    expect(await resultOf(checkpoint(fixture, 'BF16', 'bare'), request, 'f16')).toEqual(one);
    expect(one.sizeBytes / expected.sizeBytes).toBeLessThan(0.52);
  });
});

describe.each([
  ['sd1', 'base'],
  ['sd1', 'control'],
  ['sdxl', 'base'],
] as const)('a request of %s %s in F16 (software)', (architecture, name) => {
  const fixture = readFixture(architecture);
  const request = rowsOfCase(fixture, name)[0]!;

  test.each(['f32', 'f16'] as const)(
    'answers in F16 what the same values give in F32, in %s storage',
    async (storage) => {
      const source = sourceOf(folder, 'model');
      checkpoint(fixture, 'F16', 'ldm')(source.path);
      await engine.loadModel(source, storage);
      const exact = await run(engine, 'model', [request]);
      const same = await run(engine, 'model', [changed(request, widened)]);
      const { outs } = await engine.forward({ model: 'model', requests: [changed(request, half)] });
      const [out] = outs;
      expect(out).toMatchObject({ dtype: 'F16', shape: [1, 4, ...request.x.shape.slice(2)] });
      // The same numbers reach the GPU, so the only difference is the rounding of the answer.
      expect(out!.data).toEqual(fromF32('F16', same));
      expect(normalisedError(toF32('F16', out!.data), exact)).toBeLessThan(2e-3);
      await engine.unloadModel('model');
    },
  );

  test('runs in one batch with an F32 request, each answered in its own dtype', async () => {
    const source = sourceOf(folder, 'model');
    checkpoint(fixture, 'F16', 'ldm')(source.path);
    await engine.loadModel(source, 'f32');
    const alone = await engine.forward({ model: 'model', requests: [request] });
    const { outs } = await engine.forward({ model: 'model', requests: [changed(request, half), request] });
    expect(outs.map(({ dtype }) => dtype)).toEqual(['F16', 'F32']);
    expect(normalisedError(toF32('F32', outs[1]!.data), toF32('F32', alone.outs[0]!.data))).toBeLessThan(
      1e-6,
    );
    await engine.unloadModel('model');
  });
});
