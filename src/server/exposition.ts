/**
 * Statistics under their Prometheus names: one table of everything that is read off when somebody looks. What must be
 * counted as it happens (requests, histograms) is in `metrics.ts`.
 */
import { Counter, Gauge, type Registry } from 'prom-client';
import type { ServerStats } from './protocol.ts';

type Labels = Readonly<Record<string, string>>;

interface Series {
  readonly kind: 'gauge' | 'counter';
  readonly help: string;
  readonly labels?: readonly string[];
  readonly read: (stats: ServerStats) => number | readonly (readonly [Labels, number])[];
}

const gauge = (help: string, read: (stats: ServerStats) => number): Series => ({ kind: 'gauge', help, read });
const counter = (help: string, read: (stats: ServerStats) => number): Series => ({
  kind: 'counter',
  help,
  read,
});

/** Taken for an adapter's size where none is loaded, to say how many there is room for: a LoRA of rank 16 for SDXL. */
const TYPICAL_ADAPTER_BYTES = 96 * 1024 ** 2;

export const SERIES: Readonly<Record<string, Series>> = {
  unetd_info: {
    kind: 'gauge',
    help: 'Constant 1, with version and device as labels',
    labels: ['version', 'device', 'backend'],
    read: ({ server, engine: { device } }) => [
      [{ version: server.split('/')[1] ?? '', device: device.name, backend: device.backend }, 1],
    ],
  },
  unetd_ready: gauge('Whether the engine answers and the server takes requests', (s) => (s.ready ? 1 : 0)),
  unetd_uptime_seconds: gauge('Age of the server', (s) => s.uptimeMs / 1000),
  unetd_engine_restarts_total: counter('Restarts of the engine process', (s) => s.restarts),
  unetd_connections: gauge('Open WebSocket connections', (s) => s.connections),
  unetd_connections_accepted_total: counter('WebSocket connections so far', (s) => s.traffic.accepted),
  unetd_connections_refused_total: counter('WebSocket upgrades refused', (s) => s.traffic.refused),
  unetd_received_bytes_total: counter('Bytes from WebSockets', (s) => s.traffic.receivedBytes),
  unetd_sent_bytes_total: counter('Bytes to WebSockets', (s) => s.traffic.sentBytes),
  unetd_queue_depth: gauge('Forwards that wait for a batch', (s) => s.queue.requests),
  unetd_queue_limit: gauge('Most forwards that may wait', (s) => s.queue.limit),
  unetd_running_requests: gauge('Forwards in the batches that the engine has', (s) => s.queue.running),
  unetd_forwards_total: perWork('Forwards that gave a result', (work) => work.forwards),
  unetd_images_total: perWork('Images of the forwards that gave a result', (work) => work.images),
  unetd_models_loaded: gauge('Models in GPU memory', (s) => s.engine.models.length),
  unetd_model_weight_bytes: {
    kind: 'gauge',
    help: 'GPU memory of the weights of a loaded model',
    labels: ['model', 'dtype'],
    read: (s) => s.engine.models.map(({ model, dtype, sizeBytes }) => [{ model, dtype }, sizeBytes]),
  },
  unetd_model_loads_total: counter('Models put on the GPU', (s) => s.engine.turnover.modelLoads),
  unetd_model_evictions_total: counter('Models that made room', (s) => s.engine.turnover.modelEvictions),
  unetd_adapters: perModel('LoRA adapters in GPU memory', (adapters) => adapters.length),
  unetd_adapter_bytes: perModel('GPU memory that LoRA adapters use', (adapters) =>
    adapters.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
  ),
  unetd_adapter_loads_total: counter('LoRAs put on the GPU', (s) => s.engine.turnover.adapterLoads),
  unetd_adapter_evictions_total: counter('LoRAs that made room', (s) => s.engine.turnover.adapterEvictions),
  unetd_memory_budget_bytes: gauge('GPU memory the engine may use', (s) => s.engine.memory.budgetBytes),
  unetd_memory_weight_bytes: gauge('GPU memory of model weights', (s) => s.engine.memory.weightBytes),
  unetd_memory_adapter_bytes: gauge('GPU memory set aside for LoRAs', (s) => s.engine.memory.adapterBytes),
  unetd_memory_arena_bytes: gauge('GPU memory of activations', (s) => s.engine.memory.arenaBytes),
  unetd_memory_peak_bytes: gauge('Most GPU memory used at once', (s) => s.engine.memory.peakBytes),
  unetd_incoming_bytes: gauge('Memory set aside for requests on their way', (s) => s.incoming.bytes),
  unetd_incoming_limit_bytes: gauge('Most memory for those', (s) => s.incoming.limitBytes),
  unetd_kept_bytes: gauge('Tensors kept for connections', (s) => s.kept.bytes),
  unetd_upload_bytes: gauge('Uploaded files on disk', (s) => s.uploads.bytes),
  unetd_upload_quota_bytes: gauge('Disk space for uploaded files', (s) => s.uploads.quotaBytes),
  process_resident_memory_bytes: gauge('Memory of the serving process', (s) => s.residentBytes),
  process_cpu_seconds_total: counter('Processor time of the serving process', () => {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1e6;
  }),
  unetd_lora_requests_info: {
    kind: 'gauge',
    help: 'Adapters on the GPU, adapters waited for, adapters there is room for; the value is the time of the scrape',
    labels: ['running_lora_adapters', 'waiting_lora_adapters', 'max_lora'],
    read: (stats) => [[loraLabels(stats), Date.now() / 1000]],
  },
};

function perWork(help: string, of: (work: ServerStats['work'][number]) => number): Series {
  return {
    kind: 'counter',
    help,
    labels: ['model'],
    read: (s) => s.work.map((work) => [{ model: work.model }, of(work)]),
  };
}

function perModel(
  help: string,
  of: (adapters: ServerStats['engine']['models'][number]['adapters']) => number,
): Series {
  return {
    kind: 'gauge',
    help,
    labels: ['model'],
    read: (s) => s.engine.models.map(({ model, adapters }) => [{ model }, of(adapters)]),
  };
}

/** As inference gateways read them: comma-separated lists, and the number of adapters the GPU can hold for a batch. */
function loraLabels({ engine, waitingLoras }: ServerStats): Labels {
  const adapters = engine.models.flatMap((model) => model.adapters);
  const list = (names: readonly string[]): string =>
    [...new Set(names)].map((name) => name.replaceAll(',', '%2C')).join(',');
  const used = adapters.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const budget = engine.memory.adapterBudgetBytes * Math.max(1, engine.models.length);
  const mean = adapters.length === 0 ? TYPICAL_ADAPTER_BYTES : used / adapters.length;
  return {
    running_lora_adapters: list(adapters.map(({ lora }) => lora)),
    waiting_lora_adapters: list(waitingLoras),
    max_lora: String(adapters.length + Math.max(0, Math.floor((budget - used) / mean))),
  };
}

/** The series of the table in one registry. */
export class Exposition {
  readonly #metrics: ReadonlyMap<string, Gauge | Counter>;

  constructor(registry: Registry) {
    this.#metrics = new Map(
      Object.entries(SERIES).map(([name, { kind, help, labels = [] }]) => {
        const options = { name, help, labelNames: [...labels], registers: [registry] };
        return [name, kind === 'gauge' ? new Gauge(options) : new Counter(options)];
      }),
    );
  }

  /** Takes over the numbers; series of labels that are gone disappear. */
  show(stats: ServerStats): void {
    for (const [name, metric] of this.#metrics) {
      const value = SERIES[name]!.read(stats);
      metric.reset();
      for (const [labels, each] of typeof value === 'number' ? ([[{}, value]] as const) : value)
        metric.inc(labels, each);
    }
  }
}
