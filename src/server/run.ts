/**
 * Runs one batch on an engine so that a bad request fails alone: what does not fit into memory is halved, what fails
 * otherwise is run again request by request. Chooses no requests (`batcher.ts`) and checks none.
 */
import { imagesIn, imagesOf } from '../engine/check.ts';
import type { EngineApi, StepRequest, TensorData } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';

export interface StepOutcome {
  readonly out: TensorData;
  readonly gpuMs: number;
  /** Images and requests of the forward that gave the result. */
  readonly images: number;
  readonly requests: number;
}

export interface RunLimits {
  readonly maxBatch: number;
  /** Called with the images of a forward that did not fit into memory. */
  readonly onOutOfMemory: (images: number) => void;
  /** Called before a step runs again because the engine no longer has its model or adapters. */
  readonly reload: (model: string, step: StepRequest) => Promise<void>;
  /** Whether the client of the step has gone: then it is not run again. */
  readonly isCancelled: (step: StepRequest) => boolean;
}

type Outcomes = readonly PromiseSettledResult<StepOutcome>[];

/** Outcomes in the order of `steps`; never rejects. */
export async function runSteps(
  engine: EngineApi,
  model: string,
  steps: readonly StepRequest[],
  limits: RunLimits,
): Promise<Outcomes> {
  const [first] = steps;
  if (first === undefined) return [];
  const images = imagesIn(steps);
  if (steps.length === 1 && images > limits.maxBatch)
    return [await settle(runHalves(engine, model, first, limits))];
  try {
    const { outs, gpuMs } = await engine.forward({ model, requests: steps });
    return steps.map((_, index) => ({
      status: 'fulfilled',
      value: { out: outs[index]!, gpuMs, images, requests: steps.length },
    }));
  } catch (cause) {
    const error = UnetdError.from(cause);
    if (isTooMuch(error)) limits.onOutOfMemory(images);
    if (steps.length > 1) return runApart(engine, model, steps, limits, error);
    return [await settle(runAgain(engine, model, first, limits, error))];
  }
}

/** Whether fewer images at once may do: memory ran out, or a tensor of the batch exceeds a limit of the adapter. */
function isTooMuch({ code }: UnetdError): boolean {
  return code === 'ERR_OUT_OF_MEMORY' || code === 'ERR_TOO_LARGE';
}

/** After a failure of several: halves when memory ran out, else one by one. */
async function runApart(
  engine: EngineApi,
  model: string,
  steps: readonly StepRequest[],
  limits: RunLimits,
  error: UnetdError,
): Promise<Outcomes> {
  const size = isTooMuch(error) ? Math.ceil(steps.length / 2) : 1;
  const outcomes: PromiseSettledResult<StepOutcome>[] = [];
  for (let start = 0; start < steps.length; start += size) {
    const part = steps.slice(start, start + size);
    if (part.every(limits.isCancelled)) {
      outcomes.push(
        ...part.map((): PromiseSettledResult<StepOutcome> => ({ status: 'rejected', reason: error })),
      );
    } else outcomes.push(...(await runSteps(engine, model, part, limits)));
  }
  return outcomes;
}

/** After a failure of one: halves of its images when memory ran out, reload when the engine had dropped something. */
async function runAgain(
  engine: EngineApi,
  model: string,
  step: StepRequest,
  limits: RunLimits,
  error: UnetdError,
): Promise<StepOutcome> {
  if (isTooMuch(error) && imagesOf(step) > 1) return runHalves(engine, model, step, limits);
  if (error.code !== 'ERR_MODEL_NOT_LOADED' && error.code !== 'ERR_UNKNOWN_LORA') throw error;
  await limits.reload(model, step);
  const { outs, gpuMs } = await engine.forward({ model, requests: [step] });
  return { out: outs[0]!, gpuMs, images: imagesOf(step), requests: 1 };
}

/** Images are independent of each other, so a step may be cut between them. */
async function runHalves(
  engine: EngineApi,
  model: string,
  step: StepRequest,
  limits: RunLimits,
): Promise<StepOutcome> {
  const images = imagesOf(step);
  const half = Math.min(limits.maxBatch, Math.ceil(images / 2));
  const parts: StepOutcome[] = [];
  for (let start = 0; start < images; start += half) {
    const part = sliceImages(step, start, Math.min(images, start + half));
    const [outcome] = await runSteps(engine, model, [part], limits);
    if (outcome?.status !== 'fulfilled') throw outcome?.reason;
    parts.push(outcome.value);
  }
  const gpuMs = parts.reduce((sum, part) => sum + part.gpuMs, 0);
  return { out: joinImages(parts.map((part) => part.out)), gpuMs, images: parts[0]!.images, requests: 1 };
}

/** Images `start` to `end` (exclusive) of a step; the tensors share memory with it. */
export function sliceImages(step: StepRequest, start: number, end: number): StepRequest {
  const cut = (tensor: TensorData): TensorData => {
    const [images = 1, ...rest] = tensor.shape;
    const bytes = tensor.data.byteLength / images;
    return {
      ...tensor,
      shape: [end - start, ...rest],
      data: tensor.data.subarray(start * bytes, end * bytes),
    };
  };
  const cutList = (list: readonly (TensorData | null)[]): readonly (TensorData | null)[] =>
    list.map((entry) => (entry === null ? null : cut(entry)));
  const { control, y } = step;
  return {
    loras: step.loras,
    x: cut(step.x),
    timesteps: cut(step.timesteps),
    context: cut(step.context),
    ...(y === undefined ? {} : { y: cut(y) }),
    ...(control === undefined
      ? {}
      : {
          control: {
            ...(control.input === undefined ? {} : { input: cutList(control.input) }),
            ...(control.middle === undefined ? {} : { middle: cutList(control.middle) }),
            ...(control.output === undefined ? {} : { output: cutList(control.output) }),
          },
        }),
  };
}

/** The images of all parts, in order. */
export function joinImages(parts: readonly TensorData[]): TensorData {
  const first = parts[0]!;
  const images = parts.reduce((sum, part) => sum + (part.shape[0] ?? 0), 0);
  return {
    ...first,
    shape: [images, ...first.shape.slice(1)],
    data: Buffer.concat(parts.map((part) => part.data)),
  };
}

async function settle<Value>(promise: Promise<Value>): Promise<PromiseSettledResult<Value>> {
  const [outcome] = await Promise.allSettled([promise]);
  return outcome;
}
