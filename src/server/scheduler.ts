/**
 * Takes one checked forward from request to result: loads what it names, queues it, runs its batch. Joins `residents.ts`,
 * `batcher.ts` and `run.ts`; knows connections only by name.
 */
import { batchKey, checkStep, imagesOf } from '../engine/check.ts';
import type { EngineApi, StepRequest, TensorData } from '../engine/types.ts';
import { Batcher, type Job } from './batcher.ts';
import type { Clock } from './clock.ts';
import { completeControl, type ForwardMessage } from './forward.ts';
import type { Metrics } from './metrics.ts';
import type { Timing } from './protocol.ts';
import type { Residents } from './residents.ts';
import { runSteps, type StepOutcome } from './run.ts';

export interface SchedulerOptions {
  readonly maxBatch: number;
  readonly batchWaitMs: number;
  readonly queueLimit: number;
}

interface Work {
  readonly step: StepRequest;
  readonly signal: AbortSignal;
}

interface Done extends StepOutcome {
  readonly startedAt: number;
}

/** Most (model, key) pairs whose reduced batch size is remembered. */
const MAX_CAPS = 1024;

export class Scheduler {
  readonly #engine: EngineApi;
  readonly #residents: Residents;
  readonly #metrics: Metrics;
  readonly #clock: Clock;
  readonly #maxBatch: number;
  readonly #batcher: Batcher<Work, Done>;
  /** Batch sizes that memory forced below `maxBatch`, by model and key. */
  readonly #caps = new Map<string, number>();

  constructor(
    engine: EngineApi,
    residents: Residents,
    metrics: Metrics,
    clock: Clock,
    options: SchedulerOptions,
  ) {
    this.#engine = engine;
    this.#residents = residents;
    this.#metrics = metrics;
    this.#clock = clock;
    this.#maxBatch = options.maxBatch;
    this.#batcher = new Batcher(
      {
        capOf: (job) => this.#caps.get(capKey(job)) ?? options.maxBatch,
        waitMs: options.batchWaitMs,
        queueLimit: options.queueLimit,
      },
      (jobs, startedAt) => this.#run(jobs, startedAt),
      clock,
    );
  }

  get queue(): { readonly requests: number; readonly limit: number; readonly running: number } {
    const { waiting, running, options } = this.#batcher;
    return { requests: waiting, limit: options.queueLimit, running };
  }

  /** Runs a forward for a connection. Rejects with the abort reason of `signal`, or an UnetdError. */
  async forward(
    owner: string,
    message: ForwardMessage,
    signal: AbortSignal,
  ): Promise<{ readonly out: TensorData; readonly timing: Timing }> {
    const arrivedAt = this.#clock.now();
    const { model } = message;
    const info = this.#residents.model(model) ?? (await this.#residents.needModel(model));
    const release = this.#residents.use(model);
    try {
      const step = checkStep(info.config, completeControl(message, info.config), model);
      for (const { lora } of step.loras) await this.#residents.needAdapter(lora, model);
      const images = imagesOf(step);
      const job = { owner, model, key: batchKey(step), images, work: { step, signal } };
      const done = await this.#batcher.submit(job, signal);
      const timing: Timing = {
        queueMs: round(done.startedAt - arrivedAt),
        gpuMs: round(done.gpuMs),
        batch: done.images,
        batchedRequests: done.requests,
      };
      this.#metrics.forwarded(timing, images, this.#clock.now() - arrivedAt);
      return { out: done.out, timing };
    } finally {
      release();
    }
  }

  async #run(jobs: readonly Job<Work>[], startedAt: number): Promise<readonly PromiseSettledResult<Done>[]> {
    const first = jobs[0]!;
    const cancelled = new Map(jobs.map(({ work }) => [work.step, work.signal]));
    // A cancelled request lets go of the model at once, but its batch still runs.
    const release = this.#residents.use(first.model);
    const outcomes = await runSteps(
      this.#engine,
      first.model,
      jobs.map((job) => job.work.step),
      {
        maxBatch: this.#batcher.options.capOf(first),
        onOutOfMemory: (images) => this.#lowerCap(capKey(first), images),
        reload: (model, step) => this.#reload(model, step),
        isCancelled: (step) => cancelled.get(step)?.aborted ?? false,
      },
    );
    release();
    const images = jobs.reduce((sum, job) => sum + job.images, 0);
    this.#metrics.batched(images, this.#clock.now() - startedAt);
    return outcomes.map((outcome) =>
      outcome.status === 'fulfilled' ? { ...outcome, value: { ...outcome.value, startedAt } } : outcome,
    );
  }

  /** The engine dropped the model or an adapter to make room: loads again what the step needs. */
  async #reload(model: string, step: StepRequest): Promise<void> {
    this.#residents.forget(model);
    await this.#residents.needModel(model);
    for (const { lora } of step.loras) await this.#residents.needAdapter(lora, model);
  }

  #lowerCap(key: string, images: number): void {
    if (this.#caps.size >= MAX_CAPS) this.#caps.clear();
    const cap = Math.min(this.#caps.get(key) ?? this.#maxBatch, Math.max(1, Math.floor(images / 2)));
    this.#caps.set(key, cap);
  }
}

function capKey({ model, key }: { readonly model: string; readonly key: string }): string {
  return `${model}\n${key}`;
}

function round(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}
