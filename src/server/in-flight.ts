/**
 * The batches that the engine has, and when it should have the next: shortly before the only one is over, so that the GPU need not wait
 * until that is sent over and made ready. Pure logic over times that it is told; chooses and runs no batch.
 */

/** A batch that has been taken. */
export interface Taken {
  /** The connection that leads it. */
  readonly owner: string;
  /** Batches of one kind take as long as each other. */
  readonly kind: string;
  readonly requests: number;
  /** When it started: when it was taken, or when the one before it was over, whichever came last. */
  startedAt: number;
}

/** The one that runs, and one that is made ready behind it. */
const MOST = 2;
/**
 * How long before the usual end of a batch the next is taken. Who comes later has no place in that, so this is little more than it
 * takes to have it ready.
 */
const EARLY_SHARE = 0.25;
const EARLY_MS = 25;
/** Most kinds whose times are remembered. */
const MAX_KINDS = 1024;

export class InFlight {
  /** In the order in which they were taken. */
  readonly #batches: Taken[] = [];
  /** Kind -> milliseconds of the last such batch. */
  readonly #usualMs = new Map<string, number>();

  get requests(): number {
    return this.#batches.reduce((sum, { requests }) => sum + requests, 0);
  }

  /** When the next batch may be taken; Infinity where only the end of one can tell. */
  get openAt(): number {
    const [first] = this.#batches;
    if (first === undefined) return Number.NEGATIVE_INFINITY;
    if (this.#batches.length >= MOST) return Number.POSITIVE_INFINITY;
    const usualMs = this.#usualMs.get(first.kind) ?? Number.POSITIVE_INFINITY;
    return first.startedAt + usualMs - Math.min(usualMs * EARLY_SHARE, EARLY_MS);
  }

  has(owner: string): boolean {
    return this.#batches.some((batch) => batch.owner === owner);
  }

  /** Milliseconds that the batches led by an owner will have run, as far as one knows. */
  expectedMs(owner: string, now: number): number {
    const own = this.#batches.filter((batch) => batch.owner === owner);
    return own.reduce(
      (sum, { kind, startedAt }) => sum + Math.max(this.#usualMs.get(kind) ?? 0, now - startedAt),
      0,
    );
  }

  add(batch: Taken): void {
    this.#batches.push(batch);
  }

  /** Milliseconds that a batch ran. Those of one that did not run as it should tell nothing of others. */
  end(batch: Taken, now: number, isUsual: boolean): number {
    const at = this.#batches.indexOf(batch);
    this.#batches.splice(at, 1);
    for (const next of this.#batches.slice(at)) next.startedAt = now;
    const ms = now - batch.startedAt;
    if (this.#usualMs.size >= MAX_KINDS) this.#usualMs.clear();
    if (isUsual) this.#usualMs.set(batch.kind, ms);
    return ms;
  }
}
