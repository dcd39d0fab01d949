/**
 * Takes one checked forward from request to result: loads what it names, queues it, runs its batch. Joins `residents.ts`,
 * `batcher.ts` and `run.ts`; knows connections only by name.
 */
import { batchKey, checkStep, imagesOf } from '../engine/check.ts';
import type { EngineApi, StepRequest, TensorData } from '../engine/types.ts';
import { Batcher, groupOf, type Job } from './batcher.ts';
import { BatchCaps } from './caps.ts';
import type { Clock } from './clock.ts';
import { completeControl, type ForwardMessage } from './forward.ts';
import type { Taken } from './in-flight.ts';
import type { Metrics } from './metrics.ts';
import type { Timing } from './protocol.ts';
import type { Residents } from './residents.ts';
import { joinImages, runSteps, type StepOutcome, sliceImages } from './run.ts';
import { Tally } from './tally.ts';

export interface SchedulerOptions {
  readonly maxBatch: number;
  readonly batchWaitMs: number;
  readonly queueLimit: number;
}

interface Work {
  readonly step: StepRequest;
  readonly signal: AbortSignal;
  /** To be called when its batch is taken. */
  readonly waited: () => void;
}

interface Done extends StepOutcome {
  readonly startedAt: number;
}

export class Scheduler {
  readonly #engine: EngineApi;
  readonly #residents: Residents;
  readonly #metrics: Metrics;
  readonly #clock: Clock;
  readonly #caps: BatchCaps;
  readonly #batcher: Batcher<Work, Done>;
  /** LoRAs of the requests that wait. */
  readonly #demand = new Tally();

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
    this.#caps = new BatchCaps(options.maxBatch, clock);
    this.#batcher = new Batcher(
      {
        capOf: (job) => this.#caps.of(groupOf(job)),
        waitMs: options.batchWaitMs,
        queueLimit: options.queueLimit,
      },
      (jobs, turn) => this.#run(jobs, turn),
      clock,
    );
  }

  get queue(): { readonly requests: number; readonly limit: number; readonly running: number } {
    const { waiting, running, options } = this.#batcher;
    return { requests: waiting, limit: options.queueLimit, running };
  }

  /** LoRAs that requests without a place in a batch ask for. */
  get waitingLoras(): readonly string[] {
    return this.#demand.names;
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
    const loras = message.step.loras.map(({ lora }) => lora);
    const release = this.#residents.use(model, loras);
    let waited = (): void => {};
    try {
      const step = checkStep(info.config, completeControl(message, info.config), model);
      for (const lora of loras) await this.#residents.needAdapter(lora, model);
      waited = this.#demand.add(loras);
      // What cannot be made ready makes its own forward fail.
      if (loras.length > 0) await this.#engine.readyAdapters(model, loras).catch(() => {});
      const done = await this.#runParts({ owner, model, key: batchKey(step) }, { step, signal, waited });
      const images = imagesOf(step);
      const timing: Timing = {
        queueMs: round(done.startedAt - arrivedAt),
        gpuMs: round(done.gpuMs),
        batch: done.images,
        batchedRequests: done.requests,
      };
      const latencyMs = this.#clock.now() - arrivedAt;
      this.#metrics.forwarded({ owner, model, images, timing, latencyMs });
      return { out: done.out, timing };
    } finally {
      waited();
      release();
    }
  }

  /** A request of more images than a batch may hold takes several turns, between which others have theirs. */
  async #runParts(place: Pick<Job<Work>, 'owner' | 'model' | 'key'>, work: Work): Promise<Done> {
    const { step, signal } = work;
    const all = imagesOf(step);
    const parts: Done[] = [];
    let start = 0;
    do {
      const images = Math.min(all - start, this.#caps.of(groupOf(place)));
      const part = images === all ? step : sliceImages(step, start, start + images);
      const job = { ...place, images, admitted: start > 0, work: { ...work, step: part } };
      parts.push(await this.#batcher.submit(job, signal));
      start += images;
    } while (start < all);
    const first = parts[0]!;
    if (parts.length === 1) return first;
    return {
      out: joinImages(parts.map(({ out }) => out)),
      gpuMs: parts.reduce((sum, { gpuMs }) => sum + gpuMs, 0),
      images: Math.max(...parts.map(({ images }) => images)),
      requests: Math.max(...parts.map(({ requests }) => requests)),
      startedAt: first.startedAt,
    };
  }

  async #run(
    jobs: readonly Job<Work>[],
    turn: Pick<Taken, 'startedAt'>,
  ): Promise<readonly PromiseSettledResult<Done>[]> {
    const first = jobs[0]!;
    for (const { work } of jobs) work.waited();
    const cancelled = new Map(jobs.map(({ work }) => [work.step, work.signal]));
    // A cancelled request lets go of the model at once, but its batch still runs.
    const loras = jobs.flatMap(({ work }) => work.step.loras.map(({ lora }) => lora));
    const release = this.#residents.use(first.model, loras);
    const outcomes = await runSteps(
      this.#engine,
      first.model,
      jobs.map((job) => job.work.step),
      {
        maxBatch: this.#caps.of(groupOf(first)),
        onOutOfMemory: (images) => this.#caps.lower(groupOf(first), images),
        reload: (model, step) => this.#reload(model, step),
        isCancelled: (step) => cancelled.get(step)?.aborted ?? false,
      },
    );
    release();
    const { startedAt } = turn;
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
}

function round(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}
