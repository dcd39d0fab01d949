/**
 * Counts what the server does: the source of `stats`, the monitor page and the Prometheus text. Owns the counters of one
 * server; nothing here is global.
 */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { EngineStats } from '../engine/types.ts';
import type { ErrorCode } from '../errors.ts';
import type { ServerStats, Timing } from './protocol.ts';

/** Latencies that the percentiles look back on. */
const WINDOW = 512;

/** What the rest of the server is asked for whenever somebody looks. */
export interface Observed {
  readonly server: string;
  readonly ready: boolean;
  readonly restarts: number;
  readonly connections: number;
  readonly queue: ServerStats['queue'];
  readonly kept: ServerStats['kept'];
  readonly uploads: ServerStats['uploads'];
}

export class Metrics {
  readonly #registry = new Registry();
  readonly #startedAt: number = performance.now();
  readonly #latencies: number[] = [];
  #completed = 0;
  #failed = 0;
  #cancelled = 0;
  #images = 0;
  #batches = 0;
  readonly #requests: Counter<'op' | 'result'>;
  readonly #batchImages: Histogram;
  readonly #queueSeconds: Histogram;
  readonly #gpuSeconds: Histogram;
  readonly #gauges: ReadonlyMap<string, Gauge>;

  constructor() {
    const registers = [this.#registry];
    this.#requests = new Counter({
      name: 'unetd_requests_total',
      help: 'Requests answered, by operation and result (ok or the error code)',
      labelNames: ['op', 'result'],
      registers,
    });
    this.#batchImages = new Histogram({
      name: 'unetd_batch_images',
      help: 'Images per forward of the engine',
      buckets: [1, 2, 4, 8, 16, 32, 64],
      registers,
    });
    const buckets = [0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];
    this.#queueSeconds = new Histogram({
      name: 'unetd_queue_seconds',
      help: 'Wait of a forward until its batch started',
      buckets,
      registers,
    });
    this.#gpuSeconds = new Histogram({
      name: 'unetd_gpu_seconds',
      help: 'Time of a batch in the engine',
      buckets,
      registers,
    });
    this.#gauges = new Map(
      Object.entries(GAUGES).map(([name, help]) => [
        name,
        new Gauge({ name: `unetd_${name}`, help, registers }),
      ]),
    );
  }

  /** One answered request. */
  answered(op: string, code: ErrorCode | 'ok'): void {
    this.#requests.inc({ op, result: code });
    if (op !== 'forward') return;
    if (code === 'ok') this.#completed += 1;
    else if (code === 'ERR_CANCELLED') this.#cancelled += 1;
    else this.#failed += 1;
  }

  /** One forward that gave a result, with the time since its request arrived. */
  forwarded(timing: Timing, images: number, latencyMs: number): void {
    this.#images += images;
    this.#queueSeconds.observe(timing.queueMs / 1000);
    this.#latencies.push(latencyMs);
    if (this.#latencies.length > WINDOW) this.#latencies.shift();
  }

  /** One batch the batcher started and finished. */
  batched(images: number, elapsedMs: number): void {
    this.#batches += 1;
    this.#batchImages.observe(images);
    this.#gpuSeconds.observe(elapsedMs / 1000);
  }

  stats(observed: Observed, engine: EngineStats): ServerStats {
    const sorted = [...this.#latencies].sort((a, b) => a - b);
    const at = (share: number): number =>
      sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? 0;
    const perBatch = (count: number): number => (this.#batches === 0 ? 0 : count / this.#batches);
    return {
      ...observed,
      uptimeMs: performance.now() - this.#startedAt,
      engine,
      forwards: {
        completed: this.#completed,
        failed: this.#failed,
        cancelled: this.#cancelled,
        images: this.#images,
        batches: this.#batches,
        meanBatchRequests: perBatch(this.#completed),
        meanBatchImages: perBatch(this.#images),
      },
      latencyMs: { p50: at(0.5), p95: at(0.95), p99: at(0.99) },
    };
  }

  /** The Prometheus text format. */
  async text(observed: Observed, engine: EngineStats | null): Promise<string> {
    const values: Readonly<Record<keyof typeof GAUGES, number>> = {
      ready: observed.ready ? 1 : 0,
      engine_restarts: observed.restarts,
      connections: observed.connections,
      queue_depth: observed.queue.requests,
      running_requests: observed.queue.running,
      kept_bytes: observed.kept.bytes,
      upload_bytes: observed.uploads.bytes,
      models_loaded: engine?.models.length ?? 0,
      memory_budget_bytes: engine?.memory.budgetBytes ?? 0,
      memory_weight_bytes: engine?.memory.weightBytes ?? 0,
      memory_adapter_bytes: engine?.memory.adapterBytes ?? 0,
      memory_arena_bytes: engine?.memory.arenaBytes ?? 0,
      memory_peak_bytes: engine?.memory.peakBytes ?? 0,
    };
    for (const [name, value] of Object.entries(values)) this.#gauges.get(name)?.set(value);
    return this.#registry.metrics();
  }

  get contentType(): string {
    return this.#registry.contentType;
  }
}

const GAUGES = {
  ready: 'Whether the engine answers and the server takes requests',
  engine_restarts: 'How often the engine process was started again',
  connections: 'Open WebSocket connections',
  queue_depth: 'Forwards that wait for a batch',
  running_requests: 'Forwards in the running batch',
  kept_bytes: 'Tensors kept for connections',
  upload_bytes: 'Uploaded files on disk',
  models_loaded: 'Models in GPU memory',
  memory_budget_bytes: 'GPU memory the engine may use',
  memory_weight_bytes: 'GPU memory of model weights',
  memory_adapter_bytes: 'GPU memory of LoRA adapters',
  memory_arena_bytes: 'GPU memory of activations',
  memory_peak_bytes: 'Most GPU memory used at once',
} as const;
