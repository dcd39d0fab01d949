/**
 * The engine in a process of its own, so that a crash of the GPU driver ends that process and not the server: restarts it with
 * back-off, loads again what was loaded, and runs what was in flight once more. Does no computing itself.
 */
import { UnetdError } from '../errors.ts';
import { Child, type ChildOptions } from './child-process.ts';
import type { CallArguments, EngineMethod } from './messages.ts';
import type {
  AdapterInfo,
  Batch,
  BatchResult,
  DeviceInfo,
  EngineApi,
  EngineHealth,
  EngineStats,
  FileSource,
  ModelInfo,
  Progress,
  StorageDtype,
} from './types.ts';

export interface EngineProcessOptions extends ChildOptions {
  /** Takes one line for each thing that happens to the process. */
  readonly log?: (line: string) => void;
  /** First pause before a restart; doubles up to 30 s while restarts fail. */
  readonly backoffMs?: number;
}

interface Call {
  readonly method: EngineMethod;
  readonly args: CallArguments;
  readonly progress: Progress | undefined;
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: UnetdError) => void;
  /** How often it has been sent to a process. */
  attempts: number;
}

interface LoadedModel {
  readonly source: FileSource;
  readonly dtype: 'auto' | StorageDtype;
  readonly adapters: Map<string, FileSource>;
}

const BACKOFF_MS = 250;
const MAX_BACKOFF_MS = 30_000;
/** A process that lived this long counts as healthy: the next pause is the first one again. */
const HEALTHY_MS = 60_000;
const MAX_ATTEMPTS = 2;

export class EngineProcess implements EngineApi, EngineHealth {
  readonly #options: EngineProcessOptions;
  #child: Child | null;
  #device: DeviceInfo;
  #restarts = 0;
  #failures = 0;
  #closed = false;
  #retry: NodeJS.Timeout | null = null;
  #lastStats: EngineStats | null = null;
  /** Calls that wait for a process that answers. */
  readonly #waiting: Call[] = [];
  readonly #inFlight = new Set<Call>();
  readonly #models = new Map<string, LoadedModel>();

  private constructor(options: EngineProcessOptions, child: Child) {
    this.#options = options;
    this.#child = child;
    this.#device = child.device;
    void child.exited.then((reason) => this.#onExit(child, reason));
  }

  /** Starts the process and waits until its engine is ready. Rejects with the engine's own error, or ERR_ENGINE_DOWN. */
  static async start(options: EngineProcessOptions = {}): Promise<EngineProcess> {
    return new EngineProcess(options, await Child.start(options));
  }

  get device(): DeviceInfo {
    return this.#device;
  }

  get alive(): boolean {
    return this.#child !== null;
  }

  get restarts(): number {
    return this.#restarts;
  }

  /** The process that runs now; undefined while it restarts. */
  get pid(): number | undefined {
    return this.#child?.pid;
  }

  async loadModel(source: FileSource, dtype: 'auto' | StorageDtype, progress?: Progress): Promise<ModelInfo> {
    const info = (await this.#call('loadModel', [source, dtype], progress)) as ModelInfo;
    this.#models.set(source.name, { source, dtype, adapters: new Map() });
    return info;
  }

  async unloadModel(model: string): Promise<void> {
    const restarts = this.#restarts;
    this.#models.delete(model);
    try {
      await this.#call('unloadModel', [model]);
    } catch (error) {
      // A restart in between has unloaded it already.
      if (restarts === this.#restarts || UnetdError.from(error).code !== 'ERR_MODEL_NOT_LOADED') throw error;
    }
  }

  async loadAdapter(source: FileSource, model: string): Promise<AdapterInfo> {
    const info = (await this.#call('loadAdapter', [source, model])) as AdapterInfo;
    this.#models.get(model)?.adapters.set(source.name, source);
    return info;
  }

  async forward(batch: Batch): Promise<BatchResult> {
    return (await this.#call('forward', [batch])) as BatchResult;
  }

  /** While the process restarts: as they were last. */
  async stats(): Promise<EngineStats> {
    // Whoever watches should see the restart, not wait for it.
    if (this.#child === null && this.#lastStats !== null) return this.#lastStats;
    this.#lastStats = (await this.#call('stats', [])) as EngineStats;
    return this.#lastStats;
  }

  async close(): Promise<void> {
    this.#closed = true;
    if (this.#retry !== null) clearTimeout(this.#retry);
    const child = this.#child;
    this.#child = null;
    this.#rejectAll(new UnetdError('ERR_ENGINE_DOWN', 'The engine was closed.'));
    await child?.close();
  }

  #call(method: EngineMethod, args: CallArguments, progress?: Progress): Promise<unknown> {
    if (this.#closed) return Promise.reject(new UnetdError('ERR_ENGINE_DOWN', 'The engine was closed.'));
    return new Promise((resolve, reject) => {
      const call: Call = { method, args, progress, resolve, reject, attempts: 0 };
      if (this.#child === null) this.#waiting.push(call);
      else void this.#send(this.#child, call);
    });
  }

  async #send(child: Child, call: Call): Promise<void> {
    call.attempts += 1;
    this.#inFlight.add(call);
    try {
      const value = await child.call(call.method, call.args, call.progress);
      this.#inFlight.delete(call);
      call.resolve(value);
    } catch (cause) {
      const error = UnetdError.from(cause);
      // Still in flight: `#onExit` decides what becomes of it. A lost device never comes back in the same process.
      if (error.code === 'ERR_DEVICE_LOST') child.kill();
      if (error.code === 'ERR_DEVICE_LOST' || child.hasExited) return;
      this.#inFlight.delete(call);
      call.reject(error);
    }
  }

  #onExit(child: Child, reason: string): void {
    if (this.#closed || this.#child !== child) return;
    this.#child = null;
    this.#options.log?.(`engine process ended (${reason}), starting it again`);
    for (const call of this.#inFlight) {
      if (call.attempts < MAX_ATTEMPTS) this.#waiting.push(call);
      else call.reject(down(`The engine process ended twice while it ran this request (${reason}).`));
    }
    this.#inFlight.clear();
    if (child.ageMs > HEALTHY_MS) this.#failures = 0;
    this.#scheduleRestart();
  }

  #scheduleRestart(): void {
    const pause = Math.min(MAX_BACKOFF_MS, (this.#options.backoffMs ?? BACKOFF_MS) * 2 ** this.#failures);
    this.#failures += 1;
    this.#retry = setTimeout(() => {
      this.#retry = null;
      void this.#restart();
    }, pause);
  }

  async #restart(): Promise<void> {
    let child: Child;
    try {
      child = await Child.start(this.#options);
    } catch (error) {
      const { message } = UnetdError.from(error);
      this.#options.log?.(`engine process could not be started: ${message}`);
      this.#rejectAll(down(`The engine process ended and could not be started again: ${message}`));
      if (!this.#closed) this.#scheduleRestart();
      return;
    }
    this.#restarts += 1;
    await this.#reload(child);
    if (this.#closed) return void child.close();
    if (child.hasExited) {
      this.#rejectAll(down('The engine process ended again while it loaded its models.'));
      return this.#scheduleRestart();
    }
    this.#child = child;
    this.#device = child.device;
    void child.exited.then((reason) => this.#onExit(child, reason));
    for (const call of this.#waiting.splice(0)) void this.#send(child, call);
  }

  /** What cannot be loaded any more is forgotten: the next forward that needs it meets ERR_MODEL_NOT_LOADED. */
  async #reload(child: Child): Promise<void> {
    for (const [name, { source, dtype, adapters }] of [...this.#models]) {
      try {
        await child.call('loadModel', [source, dtype], undefined);
      } catch (error) {
        if (child.hasExited) return;
        this.#models.delete(name);
        this.#options.log?.(`model ${name} could not be loaded again: ${UnetdError.from(error).message}`);
        continue;
      }
      for (const [lora, adapter] of [...adapters]) {
        await child.call('loadAdapter', [adapter, name], undefined).catch(() => {
          if (!child.hasExited) adapters.delete(lora);
        });
      }
    }
  }

  #rejectAll(error: UnetdError): void {
    for (const call of [...this.#waiting.splice(0), ...this.#inFlight]) call.reject(error);
    this.#inFlight.clear();
  }
}

function down(message: string): UnetdError {
  return new UnetdError('ERR_ENGINE_DOWN', message);
}
