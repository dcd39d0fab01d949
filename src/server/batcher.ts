/**
 * Which requests run together and when: a queue per connection, one batch at a time, round robin between connections.
 * Pure logic over an injected clock and an injected way to run a batch (`run.ts`); knows no sockets, tensors or GPU.
 */
import { UnetdError } from '../errors.ts';
import type { Clock } from './clock.ts';

export interface Job<Work> {
  /** The connection: turns are shared between owners. */
  readonly owner: string;
  readonly model: string;
  /** Jobs of one model with the same key can run together. */
  readonly key: string;
  readonly images: number;
  readonly work: Work;
}

export interface BatchTiming {
  /** When the batch started, on the batcher's clock. */
  readonly startedAt: number;
  readonly images: number;
  readonly requests: number;
}

/** Runs the jobs of one batch; the outcomes come in the order of the jobs. Rejecting fails them all. */
export type RunBatch<Work, Result> = (
  jobs: readonly Job<Work>[],
  startedAt: number,
) => Promise<readonly PromiseSettledResult<Result>[]>;

export interface BatcherOptions {
  /** Most images of a batch that this job leads; a single larger job runs alone. */
  readonly capOf: (job: Pick<Job<unknown>, 'model' | 'key'>) => number;
  /** How long the first job of a batch that is not full waits for company. */
  readonly waitMs: number;
  /** Most jobs that wait. */
  readonly queueLimit: number;
}

interface Entry<Work, Result> {
  readonly job: Job<Work>;
  readonly arrivedAt: number;
  readonly resolve: (result: Result) => void;
  readonly reject: (error: unknown) => void;
}

export class Batcher<Work, Result> {
  readonly options: BatcherOptions;
  readonly #run: RunBatch<Work, Result>;
  readonly #clock: Clock;
  /** Queues of owners that have any waiting job; the first one leads the next batch. */
  readonly #queues = new Map<string, Entry<Work, Result>[]>();
  #waiting = 0;
  #running = 0;
  #cancelTimer: (() => void) | null = null;
  #batchMs = 0;
  #batchRequests = 1;

  constructor(options: BatcherOptions, run: RunBatch<Work, Result>, clock: Clock) {
    this.options = options;
    this.#run = run;
    this.#clock = clock;
  }

  get waiting(): number {
    return this.#waiting;
  }

  get running(): number {
    return this.#running;
  }

  /** Queues a job. ERR_BUSY when the queue is full, ERR_CANCELLED when `signal` aborts before its batch starts. */
  submit(job: Job<Work>, signal?: AbortSignal): Promise<Result> {
    if (this.#waiting >= this.options.queueLimit) return Promise.reject(this.#busy());
    if (signal?.aborted) return Promise.reject(signal.reason);
    return new Promise((resolve, reject) => {
      const entry: Entry<Work, Result> = { job, arrivedAt: this.#clock.now(), resolve, reject };
      const queue = this.#queues.get(job.owner);
      if (queue === undefined) this.#queues.set(job.owner, [entry]);
      else queue.push(entry);
      this.#waiting += 1;
      signal?.addEventListener('abort', () => this.#withdraw(entry, signal.reason), { once: true });
      this.#advance();
    });
  }

  /** Removes a job that still waits; one that already runs is left to finish, its result goes nowhere. */
  #withdraw(entry: Entry<Work, Result>, reason: unknown): void {
    this.#remove(entry);
    entry.reject(reason);
    this.#advance();
  }

  #remove(entry: Entry<Work, Result>): void {
    const queue = this.#queues.get(entry.job.owner);
    const index = queue?.indexOf(entry) ?? -1;
    if (queue === undefined || index < 0) return;
    queue.splice(index, 1);
    this.#waiting -= 1;
    if (queue.length === 0) this.#queues.delete(entry.job.owner);
  }

  /** Starts the first batch that is due if nothing runs; otherwise sees to it that this is called again in time. */
  #advance(): void {
    this.#cancelTimer?.();
    this.#cancelTimer = null;
    if (this.#running > 0) return;
    let soonest = Number.POSITIVE_INFINITY;
    for (const owner of this.#queues.keys()) {
      const batch = this.#choose(owner);
      const left = this.#patience(batch);
      if (left <= 0) {
        this.#passTurn(owner, batch);
        void this.#start(batch);
        return;
      }
      soonest = Math.min(soonest, left);
    }
    if (soonest < Number.POSITIVE_INFINITY) {
      this.#cancelTimer = this.#clock.after(soonest, () => this.#advance());
    }
  }

  /** Milliseconds the batch may still wait for company; none when it is full. */
  #patience(batch: readonly Entry<Work, Result>[]): number {
    const images = batch.reduce((sum, entry) => sum + entry.job.images, 0);
    if (this.options.waitMs <= 0 || images >= this.options.capOf(batch[0]!.job)) return 0;
    const oldest = Math.min(...batch.map((entry) => entry.arrivedAt));
    return oldest + this.options.waitMs - this.#clock.now();
  }

  /** The first job of the owner, then compatible ones, one per owner and round in order of turns, while they fit. */
  #choose(owner: string): readonly Entry<Work, Result>[] {
    const own = this.#queues.get(owner)!;
    const leader = own[0]!;
    const cap = this.options.capOf(leader.job);
    const batch = [leader];
    let images = leader.job.images;
    const others = [...this.#queues.values()].filter((queue) => queue !== own);
    // The leader has had the first place of the first round, so the others come first in each round.
    const candidates = [...others, own].map((queue) =>
      queue.filter(
        (entry) =>
          entry !== leader && entry.job.model === leader.job.model && entry.job.key === leader.job.key,
      ),
    );
    for (let round = 0; candidates.some((queue) => round < queue.length); round += 1) {
      for (const queue of candidates) {
        const entry = queue[round];
        if (entry === undefined || images + entry.job.images > cap) continue;
        batch.push(entry);
        images += entry.job.images;
      }
    }
    return batch;
  }

  /** Takes the batch out of the queues and puts its leader's owner behind all others. */
  #passTurn(owner: string, batch: readonly Entry<Work, Result>[]): void {
    for (const entry of batch) this.#remove(entry);
    const rest = this.#queues.get(owner);
    if (rest === undefined) return;
    this.#queues.delete(owner);
    this.#queues.set(owner, rest);
  }

  async #start(batch: readonly Entry<Work, Result>[]): Promise<void> {
    const startedAt = this.#clock.now();
    this.#running = batch.length;
    try {
      const outcomes = await this.#run(
        batch.map((entry) => entry.job),
        startedAt,
      );
      for (const [index, entry] of batch.entries()) {
        const outcome = outcomes[index];
        if (outcome?.status === 'fulfilled') entry.resolve(outcome.value);
        else entry.reject(outcome?.reason ?? new UnetdError('ERR_INTERNAL', 'The batch left a request out.'));
      }
    } catch (error) {
      for (const entry of batch) entry.reject(error);
    }
    this.#batchMs = this.#clock.now() - startedAt;
    this.#batchRequests = batch.length;
    this.#running = 0;
    this.#advance();
  }

  #busy(): UnetdError {
    const batches = Math.ceil(this.#waiting / this.#batchRequests);
    const retryAfterMs = Math.max(100, Math.round(batches * this.#batchMs));
    return new UnetdError(
      'ERR_BUSY',
      `The queue holds ${this.#waiting} requests, its limit; retry in about ${retryAfterMs} ms.`,
      { waiting: this.#waiting, limit: this.options.queueLimit, retryAfterMs },
    );
  }
}
