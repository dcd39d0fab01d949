/**
 * The engine in a process of its own, so that a crash of the GPU driver ends that process and not the server: restarts it with
 * back-off, loads again what was loaded (`inventory.ts`), and runs what was in flight once more. Does no computing itself.
 */
import { UnetdError } from '../errors.ts';
import { Child, type ChildOptions } from './child-process.ts';
import { Inventory } from './inventory.ts';
import type { CallArguments, EngineMethod } from './messages.ts';
import { Patience } from './patience.ts';
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
  /** First pause before a restart; doubles up to 30 s while processes end before they did any work. */
  readonly backoffMs?: number;
  /** How long a call may take at most before the process counts as hung; by default what suits the adapter. */
  readonly hangMs?: number;
}

interface Call {
  readonly method: EngineMethod;
  readonly args: CallArguments;
  readonly progress: Progress | undefined;
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: UnetdError) => void;
  /** Processes that ended over it, for a forward those that ran no other. */
  ends: number;
  /** A forward that a process had when it ended: it is run again alone, so that one learns whether it was this one. */
  isSuspect: boolean;
}

const BACKOFF_MS = 250;
const MAX_BACKOFF_MS = 30_000;
/** A process that lived this long counts as healthy, as does one that ran a forward: the next pause is the first one again. */
const HEALTHY_MS = 60_000;
/** Processes that may end over one call. */
const MAX_ENDS = 2;

export class EngineProcess implements EngineApi, EngineHealth {
  readonly #options: EngineProcessOptions;
  #child: Child | null;
  #device: DeviceInfo;
  #restarts = 0;
  #failures = 0;
  #closed = false;
  #retry: NodeJS.Timeout | null = null;
  readonly #patience: Patience;
  /** Why no process could be started the last time, and when that is tried again. */
  #outage: { readonly reason: string; readonly until: number } | null = null;
  #lastStats: EngineStats | null = null;
  /** Calls that wait for a process that answers, or until they may run alone. */
  readonly #waiting: Call[] = [];
  readonly #inFlight = new Set<Call>();
  readonly #inventory = new Inventory();
  /** When the last forward was answered: one that waited behind it has run since then. */
  #answeredAt = 0;

  private constructor(options: EngineProcessOptions, child: Child) {
    this.#options = options;
    this.#patience = new Patience(options.hangMs);
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
    this.#inventory.add(source, dtype);
    return info;
  }

  async unloadModel(model: string): Promise<void> {
    const restarts = this.#restarts;
    this.#inventory.remove(model);
    try {
      await this.#call('unloadModel', [model]);
    } catch (error) {
      // A restart in between has unloaded it already.
      if (restarts === this.#restarts || UnetdError.from(error).code !== 'ERR_MODEL_NOT_LOADED') throw error;
    }
  }

  async loadAdapter(source: FileSource, model: string): Promise<AdapterInfo> {
    const info = (await this.#call('loadAdapter', [source, model])) as AdapterInfo;
    this.#inventory.addAdapter(model, source);
    return info;
  }

  async readyAdapters(model: string, loras: readonly string[]): Promise<void> {
    await this.#call('readyAdapters', [model, loras]);
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
    if (this.#outage !== null) return Promise.reject(out(this.#outage));
    return new Promise((resolve, reject) => {
      this.#waiting.push({ method, args, progress, resolve, reject, ends: 0, isSuspect: false });
      this.#sendWaiting();
    });
  }

  #sendWaiting(): void {
    if (this.#child === null) return;
    for (const call of this.#waiting.splice(0)) {
      if (this.#mustWait(call)) this.#waiting.push(call);
      else void this.#send(this.#child, call);
    }
  }

  /** While any forward is suspect there is one at a time. */
  #mustWait(call: Call): boolean {
    const running = this.#forwards;
    if (batchOf(call) === null || running.length === 0) return false;
    return [call, ...running, ...this.#waiting].some(({ isSuspect }) => isSuspect);
  }

  /** Those that a process has now. */
  get #forwards(): readonly Call[] {
    return [...this.#inFlight].filter((call) => batchOf(call) !== null);
  }

  /** Forwards run one after another, so each may take as long as all that a process has together. */
  #limitMs(child: Child, call: Call): number {
    const ahead = batchOf(call) === null ? [] : this.#forwards.filter((other) => other !== call);
    return [...ahead, call].reduce(
      (sum, each) => sum + this.#patience.limitMs(child.device, batchOf(each)),
      0,
    );
  }

  async #send(child: Child, call: Call): Promise<void> {
    this.#inFlight.add(call);
    const batch = batchOf(call);
    const started = performance.now();
    try {
      const value = await child.call(call.method, call.args, call.progress, this.#limitMs(child, call));
      this.#inFlight.delete(call);
      if (batch !== null) {
        const now = performance.now();
        this.#patience.note(batch, now - Math.max(started, this.#answeredAt));
        this.#answeredAt = now;
        this.#failures = 0;
      }
      call.resolve(value);
    } catch (cause) {
      const error = UnetdError.from(cause);
      // Still in flight: `#onExit` decides what becomes of it. A lost device never comes back in the same process.
      if (error.code === 'ERR_DEVICE_LOST') child.kill(error.message);
      if (error.code === 'ERR_DEVICE_LOST' || child.hasExited) return;
      this.#inFlight.delete(call);
      call.reject(error);
    }
    this.#sendWaiting();
  }

  #onExit(child: Child, reason: string): void {
    if (this.#closed || this.#child !== child) return;
    this.#child = null;
    if (child.ageMs > HEALTHY_MS) this.#failures = 0;
    const pauseMs = this.#scheduleRestart();
    this.#options.log?.(`engine process ended (${reason}), starting it again in ${pauseMs} ms`);
    const isAlone = this.#forwards.length === 1;
    for (const call of this.#inFlight) {
      const batch = batchOf(call);
      call.isSuspect = batch !== null;
      if (batch === null || isAlone) call.ends += 1;
      // Whoever made a batch of several can find out which of them it was; a second batch would end as this one did.
      const isBatch = (batch?.requests.length ?? 0) > 1;
      if (isBatch) call.reject(down(`The engine process ended while it ran a batch (${reason}).`));
      else if (call.ends < MAX_ENDS) this.#waiting.push(call);
      else {
        const what = `The engine process ended ${MAX_ENDS} times while it ran this request (${reason})`;
        call.reject(down(`${what}; it is not run again.`));
      }
    }
    this.#inFlight.clear();
  }

  /** The pause until then, in milliseconds. */
  #scheduleRestart(): number {
    const pauseMs = Math.min(MAX_BACKOFF_MS, (this.#options.backoffMs ?? BACKOFF_MS) * 2 ** this.#failures);
    this.#failures += 1;
    this.#retry = setTimeout(() => {
      this.#retry = null;
      void this.#restart();
    }, pauseMs);
    return pauseMs;
  }

  async #restart(): Promise<void> {
    const started = performance.now();
    let child: Child;
    try {
      child = await Child.start(this.#options);
    } catch (error) {
      return this.#failToStart(UnetdError.from(error).message);
    }
    const limitMs = this.#patience.limitMs(child.device, null);
    const log = (line: string): void => this.#options.log?.(line);
    if (!this.#closed) await this.#inventory.loadInto(child, limitMs, log);
    if (this.#closed) return void child.close();
    if (child.hasExited) return this.#failToStart('it ended again while it loaded its models');
    this.#outage = null;
    this.#restarts += 1;
    this.#child = child;
    this.#device = child.device;
    void child.exited.then((reason) => this.#onExit(child, reason));
    const ms = Math.round(performance.now() - started);
    log(`engine process runs again: ${this.#inventory.size} models loaded again, in ${ms} ms`);
    this.#sendWaiting();
  }

  /** Nobody waits through an outage: what waits now, and what comes until the next attempt, is told when that is. */
  #failToStart(reason: string): void {
    if (this.#closed) return;
    const pauseMs = this.#scheduleRestart();
    this.#options.log?.(`engine process could not be started: ${reason}; trying again in ${pauseMs} ms`);
    this.#outage = { reason, until: performance.now() + pauseMs };
    this.#rejectAll(out(this.#outage));
  }

  #rejectAll(error: UnetdError): void {
    for (const call of [...this.#waiting.splice(0), ...this.#inFlight]) call.reject(error);
    this.#inFlight.clear();
  }
}

function batchOf({ method, args }: Call): Batch | null {
  return method === 'forward' ? (args[0] as Batch) : null;
}

function down(message: string): UnetdError {
  return new UnetdError('ERR_ENGINE_DOWN', message);
}

function out({ reason, until }: { readonly reason: string; readonly until: number }): UnetdError {
  const retryAfterMs = Math.max(0, Math.round(until - performance.now()));
  return new UnetdError(
    'ERR_ENGINE_DOWN',
    `The engine process ended and could not be started again: ${reason}; the next attempt is in ${retryAfterMs} ms.`,
    { retryAfterMs },
  );
}
