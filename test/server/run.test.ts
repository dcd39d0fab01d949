/** How a batch is run: failures stay with their request, memory decides the size. */
import { describe, expect, it } from 'vitest';
import type { Batch, BatchResult, EngineApi, StepRequest } from '../../src/engine/types.ts';
import { UnetdError } from '../../src/errors.ts';
import { toF32 } from '../../src/half.ts';
import { type RunLimits, runSteps, sliceImages } from '../../src/server/run.ts';
import { filled } from './setting.ts';
import { standInResult, TROUBLE } from './stand-in-engine.ts';

function step(images: number, seed: number, trouble = false): StepRequest {
  const context = filled([images, 3, 6], seed);
  if (trouble) new DataView(context.data.buffer).setFloat32(0, TROUBLE.gpuError, true);
  return { loras: [], x: filled([images, 4, 2, 2], seed), timesteps: filled([images], seed), context };
}

function setUp(maxImages = 100): {
  engine: EngineApi;
  sizes: number[];
  lost: { model: boolean };
  limits: (changes?: Partial<RunLimits>) => RunLimits;
  outOfMemory: number[];
} {
  const sizes: number[] = [];
  const outOfMemory: number[] = [];
  const lost = { model: false };
  const forward = async ({ requests }: Batch): Promise<BatchResult> => {
    const images = requests.reduce((sum, { x }) => sum + x.shape[0]!, 0);
    sizes.push(images);
    if (lost.model) throw new UnetdError('ERR_MODEL_NOT_LOADED', 'evicted');
    if (images > maxImages) throw new UnetdError('ERR_OUT_OF_MEMORY', 'too many');
    return { outs: requests.map((request) => standInResult(request, new Map())), gpuMs: images };
  };
  const limits = (changes: Partial<RunLimits> = {}): RunLimits => ({
    maxBatch: 8,
    onOutOfMemory: (images) => outOfMemory.push(images),
    reload: async () => {
      lost.model = false;
    },
    isCancelled: () => false,
    ...changes,
  });
  return { engine: { forward } as unknown as EngineApi, sizes, lost, limits, outOfMemory };
}

const values = (outcomes: readonly PromiseSettledResult<{ out: { data: Uint8Array } }>[]): unknown[] =>
  outcomes.map((outcome) =>
    outcome.status === 'fulfilled' ? [...toF32('F32', outcome.value.out.data)] : outcome.reason.code,
  );

const expected = (steps: readonly StepRequest[]): unknown[] =>
  steps.map((each) => [...toF32('F32', standInResult(each, new Map()).data)]);

describe('a batch', () => {
  it('gives each request its own result', async () => {
    const { engine, limits, sizes } = setUp();
    const steps = [step(1, 1), step(2, 2), step(1, 3)];
    const outcomes = await runSteps(engine, 'm', steps, limits());
    expect(values(outcomes)).toEqual(expected(steps));
    expect(sizes).toEqual([4]);
    expect(outcomes[0]).toMatchObject({ value: { images: 4, requests: 3, gpuMs: 4 } });
  });

  it('fails only the request that is bad', async () => {
    const { engine, limits, sizes } = setUp();
    const steps = [step(1, 1), step(1, 2, true), step(2, 3)];
    const outcomes = values(await runSteps(engine, 'm', steps, limits()));
    expect(outcomes).toEqual([expected([steps[0]!])[0], 'ERR_GPU', expected([steps[2]!])[0]]);
    expect(sizes).toEqual([4, 1, 1, 2]);
  });

  it('is halved while memory runs out, down to the images of one request', async () => {
    const { engine, limits, sizes, outOfMemory } = setUp(2);
    const steps = [step(1, 1), step(1, 2), step(5, 3)];
    const outcomes = await runSteps(engine, 'm', steps, limits());
    expect(values(outcomes)).toEqual(expected(steps));
    expect(sizes).toEqual([7, 2, 5, 3, 2, 1, 2]);
    expect(outOfMemory).toEqual([7, 5, 3]);
  });

  it('fails with ERR_OUT_OF_MEMORY when one image is too many', async () => {
    const { engine, limits } = setUp(0);
    expect(values(await runSteps(engine, 'm', [step(2, 1)], limits()))).toEqual(['ERR_OUT_OF_MEMORY']);
  });

  it('cuts a request larger than the largest batch', async () => {
    const { engine, limits, sizes } = setUp();
    const large = step(7, 1);
    const outcomes = await runSteps(engine, 'm', [large], limits({ maxBatch: 3 }));
    expect(values(outcomes)).toEqual(expected([large]));
    expect(sizes).toEqual([3, 3, 1]);
  });

  it('loads again what the engine dropped, once', async () => {
    const { engine, limits, lost } = setUp();
    lost.model = true;
    const one = step(1, 1);
    expect(values(await runSteps(engine, 'm', [one], limits()))).toEqual(expected([one]));
    lost.model = true;
    const never = limits({ reload: async () => {} });
    expect(values(await runSteps(engine, 'm', [one], never))).toEqual(['ERR_MODEL_NOT_LOADED']);
  });

  it('does not run cancelled requests again', async () => {
    const { engine, limits, sizes } = setUp();
    const steps = [step(1, 1), step(1, 2, true)];
    await runSteps(engine, 'm', steps, limits({ isCancelled: (each) => each === steps[1] }));
    expect(sizes).toEqual([2, 1]);
  });

  it('can be cut between images, control included', () => {
    const control = { input: [filled([3, 8, 2, 2]), null], middle: [filled([3, 16, 1, 1])] };
    const part = sliceImages({ ...step(3, 1), y: filled([3, 5]), control }, 1, 3);
    expect(part.x.shape).toEqual([2, 4, 2, 2]);
    expect(part.y?.shape).toEqual([2, 5]);
    expect(part.control?.input?.map((entry) => entry?.shape ?? null)).toEqual([[2, 8, 2, 2], null]);
    expect(Buffer.from(part.timesteps.data)).toEqual(Buffer.from(filled([3], 1).data.subarray(4)));
  });
});
