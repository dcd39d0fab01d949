/**
 * Which requests run together and when: a queue per connection, one batch after another, the next taken shortly before the one that
 * runs is over (`in-flight.ts`). The leader of a batch comes from the connection whose lead batches have taken least time; places
 * beside it go to those who have waited longest for any.
 * Pure logic over an injected clock and an injected way to run a batch (`run.ts`); knows no sockets, tensors or GPU.
 */
import { UnetdError } from '../errors.ts';
import type { Clock } from './clock.ts';
import { InFlight, type Taken } from './in-flight.ts';

export interface Job<Work> {
  /** The connection: turns are shared between owners. */
  readonly owner: string;
  readonly model: string;
  /** Jobs of one model with the same key can run together. */
  readonly key: string;
  readonly images: number;
  /** The rest of a request of which a part has run: a full queue does not refuse it. */
  readonly admitted?: boolean;
  readonly work: Work;
}

/** Runs the jobs of one batch; the outcomes come in the order of the jobs. Rejecting fails them all. */
export type RunBatch<Work, Result> = (
  jobs: readonly Job<Work>[],
  turn: Pick<Readonly<Taken>, 'startedAt'>,
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

/** Jobs of one model and key, as they wait. */
interface Group {
  images: number;
  oldest: number;
}

export class Batcher<Work, Result> {
  readonly options: BatcherOptions;
  readonly #run: RunBatch<Work, Result>;
  readonly #clock: Clock;
  /** Queues of owners that have any waiting job; the owner that has waited longest since it got a place comes first. */
  readonly #queues = new Map<string, Entry<Work, Result>[]>();
  /**
   * Start-time fair queueing (Goyal, Vin and Cheng 1996) over the leads: owner -> milliseconds of the batches it has led, counted
   * from where the least served owner stood when it joined. Those who only ride along in a batch pay nothing.
   */
  readonly #led = new Map<string, number>();
  /** Where the owner that led last stood when it did. */
  #level = 0;
  #waiting = 0;
  readonly #inFlight = new InFlight();
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

  /** Jobs of the batches that have been taken. */
  get running(): number {
    return this.#inFlight.requests;
  }

  /**
   * Queues a job. ERR_CANCELLED (the reason of `signal`) when that aborts before its batch is taken. ERR_BUSY when the queue is full:
   * this job's, or, where another owner has more jobs waiting, that of the last of those.
   */
  submit(job: Job<Work>, signal?: AbortSignal): Promise<Result> {
    if (signal?.aborted) return Promise.reject(signal.reason);
    const isFull = this.#waiting >= this.options.queueLimit && job.admitted !== true;
    if (isFull && !this.#makeRoom(job.owner)) return Promise.reject(this.#busy());
    return new Promise((resolve, reject) => {
      const entry: Entry<Work, Result> = { job, arrivedAt: this.#clock.now(), resolve, reject };
      const queue = this.#queues.get(job.owner);
      if (queue === undefined) this.#join(job.owner, entry);
      else queue.push(entry);
      this.#waiting += 1;
      signal?.addEventListener('abort', () => this.#withdraw(entry, signal.reason), { once: true });
      this.#advance();
    });
  }

  /** A queue that begins anew. Time without jobs is not saved up: nobody stands below the level. */
  #join(owner: string, entry: Entry<Work, Result>): void {
    this.#queues.set(owner, [entry]);
    this.#led.set(owner, Math.max(this.#led.get(owner) ?? 0, this.#level));
  }

  /** Takes the last job of the longest queue back, where that is longer than this owner's would become. */
  #makeRoom(owner: string): boolean {
    const longest = [...this.#queues.values()].reduce((a, b) => (b.length > a.length ? b : a), []);
    const own = this.#queues.get(owner)?.length ?? 0;
    const last = longest.findLast(({ job }) => job.admitted !== true);
    if (last === undefined || longest.length <= own + 1) return false;
    last.reject(this.#busy());
    this.#remove(last);
    return true;
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

  /** Starts a batch that is due if the engine should have it now; otherwise sees to it that this is called again in time. */
  #advance(): void {
    this.#cancelTimer?.();
    this.#cancelTimer = null;
    if (this.#waiting === 0) return;
    const now = this.#clock.now();
    const { openAt } = this.#inFlight;
    if (openAt > now) {
      this.#advanceAt(openAt);
      return;
    }
    const groups = this.#groups();
    const left = (entry: Entry<Work, Result>): number => {
      const { images, oldest } = groups.get(groupOf(entry.job))!;
      return images >= this.options.capOf(entry.job) ? 0 : oldest + this.options.waitMs - now;
    };
    // Sorting is stable: of those who have led as much, the one that has waited longest comes first.
    const owners = [...this.#queues.keys()].sort((a, b) => this.#ledBy(a) - this.#ledBy(b));
    for (const owner of owners) {
      const leader = this.#queues.get(owner)!.find((entry) => left(entry) <= 0);
      if (leader === undefined) continue;
      void this.#start(this.#choose(leader));
      this.#advance();
      return;
    }
    this.#advanceAt(Math.min(...[...groups.values()].map(({ oldest }) => oldest)) + this.options.waitMs);
  }

  #advanceAt(time: number): void {
    if (time === Number.POSITIVE_INFINITY) return;
    this.#cancelTimer = this.#clock.after(time - this.#clock.now(), () => this.#advance());
  }

  /** What an owner has led, its batch that runs as if that were over. */
  #ledBy(owner: string): number {
    return this.#led.get(owner)! + this.#inFlight.expectedMs(owner, this.#clock.now());
  }

  #groups(): ReadonlyMap<string, Group> {
    const groups = new Map<string, Group>();
    for (const queue of this.#queues.values()) {
      for (const entry of queue) {
        const group = groups.get(groupOf(entry.job)) ?? { images: 0, oldest: entry.arrivedAt };
        group.images += entry.job.images;
        group.oldest = Math.min(group.oldest, entry.arrivedAt);
        groups.set(groupOf(entry.job), group);
      }
    }
    return groups;
  }

  /** The leader and compatible jobs beside it while they fit, each place to the owner that has fewest images in the batch. */
  #choose(leader: Entry<Work, Result>): readonly Entry<Work, Result>[] {
    const cap = this.options.capOf(leader.job);
    const batch = [leader];
    let images = leader.job.images;
    const group = groupOf(leader.job);
    const sides = [...this.#queues].map(([owner, queue]) => ({
      images: owner === leader.job.owner ? images : 0,
      rest: queue.filter((entry) => entry !== leader && groupOf(entry.job) === group),
    }));
    for (;;) {
      for (const side of sides) {
        while (side.rest.length > 0 && images + side.rest[0]!.job.images > cap) side.rest.shift();
      }
      const open = sides.filter(({ rest }) => rest.length > 0);
      const [first] = open;
      if (first === undefined) return batch;
      const side = open.reduce((a, b) => (b.images < a.images ? b : a), first);
      const entry = side.rest.shift()!;
      batch.push(entry);
      images += entry.job.images;
      side.images += entry.job.images;
    }
  }

  /** Takes the batch out of the queues and puts its owners behind all others, the leader's last. */
  #take(batch: readonly Entry<Work, Result>[]): void {
    for (const entry of batch) this.#remove(entry);
    for (const owner of new Set(batch.map(({ job }) => job.owner).reverse())) {
      const rest = this.#queues.get(owner);
      if (rest === undefined) continue;
      this.#queues.delete(owner);
      this.#queues.set(owner, rest);
    }
  }

  async #start(batch: readonly Entry<Work, Result>[]): Promise<void> {
    const jobs = batch.map((entry) => entry.job);
    const { owner } = jobs[0]!;
    this.#level = this.#ledBy(owner);
    this.#take(batch);
    const taken = { owner, kind: kindOf(jobs), requests: jobs.length, startedAt: this.#clock.now() };
    this.#inFlight.add(taken);
    let isUsual = false;
    try {
      const outcomes = await this.#run(jobs, taken);
      isUsual = outcomes.every(({ status }) => status === 'fulfilled');
      for (const [index, entry] of batch.entries()) {
        const outcome = outcomes[index];
        if (outcome?.status === 'fulfilled') entry.resolve(outcome.value);
        else entry.reject(outcome?.reason ?? new UnetdError('ERR_INTERNAL', 'The batch left a request out.'));
      }
    } catch (error) {
      for (const entry of batch) entry.reject(error);
    }
    this.#batchMs = this.#inFlight.end(taken, this.#clock.now(), isUsual);
    this.#batchRequests = batch.length;
    this.#charge(owner, this.#batchMs);
    this.#advance();
  }

  /** Adds to what the owner has led, and forgets owners that nothing need be remembered of. */
  #charge(owner: string, ms: number): void {
    this.#led.set(owner, this.#led.get(owner)! + ms);
    for (const [each, led] of this.#led) {
      const isGone = !this.#queues.has(each) && !this.#inFlight.has(each);
      if (led <= this.#level && isGone) this.#led.delete(each);
    }
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

/** Batches of one group with as many images take as long. */
function kindOf(jobs: readonly Job<unknown>[]): string {
  return `${groupOf(jobs[0]!)}\n${jobs.reduce((sum, { images }) => sum + images, 0)}`;
}

/** Jobs of one group can run together. */
export function groupOf({ model, key }: Pick<Job<unknown>, 'model' | 'key'>): string {
  return `${model}\n${key}`;
}
