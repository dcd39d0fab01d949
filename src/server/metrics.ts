/**
 * Counts what the server does: the source of `stats`, the monitor page and the Prometheus text. Owns the counters of one
 * server; nothing here is global. Which number is shown under which name is in `exposition.ts`.
 */
import { Counter, Histogram, Registry } from 'prom-client';
import type { EngineStats } from '../engine/types.ts';
import type { ErrorCode } from '../errors.ts';
import { Exposition } from './exposition.ts';
import type { ConnectionStats, ModelWork, ServerStats, Timing } from './protocol.ts';

/** Latencies that the percentiles look back on. */
const WINDOW = 512;
/** Names in a label, as every name is a time series for whoever collects them. */
const MAX_MODEL_LABELS = 256;
const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];

/** What the rest of the server is asked for whenever somebody looks. */
export type Observed = Pick<
  ServerStats,
  'server' | 'ready' | 'restarts' | 'traffic' | 'queue' | 'waitingLoras' | 'incoming' | 'kept' | 'uploads'
> & { readonly peers: readonly Omit<ConnectionStats, 'forwards' | 'images'>[] };

/** One forward of a connection that gave a result. */
export interface ForwardDone {
  readonly owner: string;
  readonly model: string;
  readonly images: number;
  readonly timing: Timing;
  /** Since the request arrived. */
  readonly latencyMs: number;
}

/** One forward of the engine for a whole batch. */
export interface StepDone {
  readonly model: string;
  readonly requests: number;
  readonly images: number;
  readonly gpuMs: number;
  /** Until the results were back in this process. */
  readonly elapsedMs: number;
}

interface Done {
  forwards: number;
  images: number;
}

type Work = { -readonly [Key in keyof ModelWork]: ModelWork[Key] };

export class Metrics {
  readonly #registry = new Registry();
  readonly #exposition: Exposition;
  readonly #startedAt: number = performance.now();
  readonly #latencies: number[] = [];
  /** Owner -> what its connection got. */
  readonly #peers = new Map<string, Done>();
  readonly #work = new Map<string, Work>();
  readonly #errors = new Map<ErrorCode, number>();
  #completed = 0;
  #failed = 0;
  #cancelled = 0;
  readonly #requests: Counter<'op' | 'result'>;
  readonly #batchImages: Histogram;
  readonly #batchRequests: Histogram;
  readonly #queueSeconds: Histogram;
  readonly #forwardSeconds: Histogram;
  readonly #batchSeconds: Histogram;
  readonly #gpuSeconds: Histogram<'model'>;

  constructor() {
    const registers = [this.#registry];
    const histogram = <Label extends string>(
      name: string,
      help: string,
      buckets: number[],
      labelNames: Label[] = [],
    ): Histogram<Label> => new Histogram({ name: `unetd_${name}`, help, buckets, labelNames, registers });
    const sizes = [1, 2, 4, 8, 16, 32, 64];
    this.#requests = new Counter({
      name: 'unetd_requests_total',
      help: 'Requests answered, by operation and result (ok or the error code)',
      labelNames: ['op', 'result'],
      registers,
    });
    this.#batchImages = histogram('batch_images', 'Images per forward of the engine', sizes);
    this.#batchRequests = histogram('batch_requests', 'Requests per forward of the engine', sizes);
    this.#queueSeconds = histogram('queue_seconds', 'Wait of a forward until its batch started', SECONDS);
    this.#forwardSeconds = histogram('forward_seconds', 'Arrival of a forward until its result', SECONDS);
    this.#batchSeconds = histogram('batch_seconds', 'A forward of the engine, transfers included', SECONDS);
    this.#gpuSeconds = histogram('gpu_seconds', 'GPU time of a forward of the engine', SECONDS, ['model']);
    this.#exposition = new Exposition(this.#registry);
  }

  /** One answered request. */
  answered(op: string, code: ErrorCode | 'ok'): void {
    this.#requests.inc({ op, result: code });
    if (code !== 'ok') this.#errors.set(code, (this.#errors.get(code) ?? 0) + 1);
    if (op !== 'forward') return;
    if (code === 'ok') this.#completed += 1;
    else if (code === 'ERR_CANCELLED') this.#cancelled += 1;
    else this.#failed += 1;
  }

  connected(owner: string): void {
    this.#peers.set(owner, { forwards: 0, images: 0 });
  }

  /** Forgets the connection and gives what it got. */
  disconnected(owner: string): Readonly<Done> {
    const done = this.#doneOf(owner);
    this.#peers.delete(owner);
    return done;
  }

  forwarded({ owner, model, images, timing, latencyMs }: ForwardDone): void {
    for (const done of [this.#doneOf(owner), this.#workOf(model)]) {
      done.forwards += 1;
      done.images += images;
    }
    this.#queueSeconds.observe(timing.queueMs / 1000);
    this.#forwardSeconds.observe(latencyMs / 1000);
    this.#latencies.push(latencyMs);
    if (this.#latencies.length > WINDOW) this.#latencies.shift();
  }

  stepped({ model, requests, images, gpuMs, elapsedMs }: StepDone): void {
    const work = this.#workOf(model);
    work.steps += 1;
    work.gpuMs += gpuMs;
    this.#batchImages.observe(images);
    this.#batchRequests.observe(requests);
    this.#batchSeconds.observe(elapsedMs / 1000);
    this.#gpuSeconds.observe({ model: work.model }, gpuMs / 1000);
  }

  stats(observed: Observed, engine: EngineStats): ServerStats {
    const sorted = [...this.#latencies].sort((a, b) => a - b);
    const at = (share: number): number =>
      sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? 0;
    const work = [...this.#work.values()];
    const images = work.reduce((sum, each) => sum + each.images, 0);
    const batches = work.reduce((sum, each) => sum + each.steps, 0);
    const perBatch = (count: number): number => (batches === 0 ? 0 : count / batches);
    return {
      ...observed,
      uptimeMs: performance.now() - this.#startedAt,
      engine,
      connections: observed.peers.length,
      peers: observed.peers.map((peer) => ({ ...peer, ...this.#doneOf(peer.owner) })),
      work: work.map((each) => ({ ...each })),
      errors: Object.fromEntries(this.#errors),
      residentBytes: process.memoryUsage.rss(),
      forwards: {
        completed: this.#completed,
        failed: this.#failed,
        cancelled: this.#cancelled,
        images,
        batches,
        meanBatchRequests: perBatch(this.#completed),
        meanBatchImages: perBatch(images),
      },
      latencyMs: { p50: at(0.5), p95: at(0.95), p99: at(0.99) },
    };
  }

  /** The Prometheus text format. */
  text(stats: ServerStats): Promise<string> {
    this.#exposition.show(stats);
    return this.#registry.metrics();
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  #doneOf(owner: string): Done {
    return this.#peers.get(owner) ?? { forwards: 0, images: 0 };
  }

  #workOf(name: string): Work {
    const model = this.#work.has(name) || this.#work.size < MAX_MODEL_LABELS ? name : 'other';
    const work = this.#work.get(model) ?? { model, forwards: 0, images: 0, steps: 0, gpuMs: 0 };
    this.#work.set(model, work);
    return work;
  }
}
