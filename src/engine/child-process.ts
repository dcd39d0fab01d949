/**
 * One engine process: started, called, ended. Matches answers to calls and tells when the process is gone; never restarts
 * anything (`process.ts` does).
 */
import { type ChildProcess, fork } from 'node:child_process';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import { UnetdError } from '../errors.ts';
import { fromFault } from './fault.ts';
import type { CallArguments, EngineMethod, FromEngine, ToEngine } from './messages.ts';
import type { DeviceInfo, EngineOptions, Progress } from './types.ts';

export interface ChildOptions {
  readonly engine?: EngineOptions;
  /** File URL of the module that exports `Engine`; this package's own unless told. */
  readonly module?: string;
  /** Takes each line that the process prints. */
  readonly output?: (line: string) => void;
  /** How long the process may take to start; 5 minutes unless told. */
  readonly startMs?: number;
}

interface Pending {
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: UnetdError) => void;
  readonly progress: Progress | undefined;
  /** Ends the process when the answer does not come. */
  readonly watchdog: NodeJS.Timeout;
}

const START_MS = 300_000;
const CLOSE_MS = 5000;
/** A process that a driver holds in the kernel does not end when it is killed: it is given up after this long. */
const KILL_MS = 10_000;
/** Characters of its last words that a message quotes. */
const LAST_WORDS = 300;

export class Child {
  readonly device: DeviceInfo;
  /** Resolves with the reason when the process is gone. */
  readonly exited: Promise<string>;
  readonly #process: ChildProcess;
  readonly #startedAt: number = performance.now();
  readonly #pending: Map<number, Pending>;
  #nextId = 1;
  #hasExited = false;
  #killed: string | null = null;
  #giveUp: (reason: string) => void = () => {};

  private constructor(child: ChildProcess, device: DeviceInfo, exited: Promise<string>) {
    this.#process = child;
    this.device = device;
    this.#pending = new Map();
    const givenUp = new Promise<string>((resolve) => {
      this.#giveUp = resolve;
    });
    this.exited = Promise.race([exited, givenUp]).then((end) => {
      const reason = this.#killed === null ? end : `${this.#killed}; ${end}`;
      this.#hasExited = true;
      for (const { reject, watchdog } of this.#pending.values()) {
        clearTimeout(watchdog);
        reject(gone(reason));
      }
      this.#pending.clear();
      return reason;
    });
    child.on('message', (message: FromEngine) => this.#receive(message));
    // Without its channel it can answer nothing more; if it is ending by itself, it may.
    child.on('disconnect', () => setTimeout(() => this.#end(), CLOSE_MS).unref());
  }

  /** Rejects with the engine's own error where it could not be made, ERR_ENGINE_DOWN where the process ended before that. */
  static async start({ engine, module, output, startMs = START_MS }: ChildOptions): Promise<Child> {
    const { UNETD_TOKEN: _secret, ...env } = process.env;
    const child = fork(new URL(`./child${extension()}`, import.meta.url), [module ?? ownEngine()], {
      env,
      serialization: 'advanced',
      execArgv: extension() === '.ts' ? ['--import', tsx()] : [],
      stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    });
    let words = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding('utf8');
      stream?.on('data', (chunk: string) => {
        words = (words + chunk).slice(-LAST_WORDS);
        for (const line of chunk.split('\n')) if (line.trim() !== '') output?.(line);
      });
    }
    const exited = new Promise<string>((resolve) => {
      child.once('error', (error) => resolve(error.message));
      child.once('exit', (code, signal) => {
        const end = signal === null ? `exit code ${code}` : `signal ${signal}`;
        resolve(words.trim() === '' ? end : `${end}; it said: ${words.trim().replace(/\s+/g, ' ')}`);
      });
    });
    const ready = new Promise<DeviceInfo>((resolve, reject) => {
      child.once('message', (message: FromEngine) => {
        if (message.kind === 'ready') resolve(message.device);
        else
          reject(message.kind === 'failed' ? fromFault(message.fault) : gone('it did not start as expected'));
      });
      void exited.then((reason) => reject(gone(reason)));
    });
    const watchdog = setTimeout(() => child.kill('SIGKILL'), startMs);
    try {
      post(child, { kind: 'start', options: engine ?? {} });
      return new Child(child, await ready, exited);
    } catch (error) {
      child.kill('SIGKILL');
      throw error;
    } finally {
      clearTimeout(watchdog);
    }
  }

  get pid(): number | undefined {
    return this.#process.pid;
  }

  get hasExited(): boolean {
    return this.#hasExited;
  }

  get ageMs(): number {
    return performance.now() - this.#startedAt;
  }

  /**
   * Rejects with the engine's error, or ERR_ENGINE_DOWN when the process ends first. One that gives no answer for `limitMs`, counted
   * from its last sign of progress, is hung: it is ended.
   */
  call(
    method: EngineMethod,
    args: CallArguments,
    progress: Progress | undefined,
    limitMs: number,
  ): Promise<unknown> {
    if (this.#hasExited) return Promise.reject(gone('it had ended before'));
    return new Promise((resolve, reject) => {
      const id = this.#nextId++;
      const hung = `it hung: no answer to ${method} within ${Math.round(limitMs)} ms`;
      const watchdog = setTimeout(() => this.kill(hung), limitMs);
      this.#pending.set(id, { resolve, reject, progress, watchdog });
      post(this.#process, { kind: 'call', id, method, args });
    });
  }

  /** Ends the process at once; `why` becomes part of the reason that `exited` gives. */
  kill(why: string): void {
    this.#killed ??= why;
    this.#end();
  }

  /** Lets the engine close, and ends the process if it does not. */
  async close(): Promise<void> {
    if (this.#hasExited) return;
    const timer = setTimeout(() => this.kill('it did not close in time'), CLOSE_MS);
    post(this.#process, { kind: 'close' });
    await this.exited;
    clearTimeout(timer);
  }

  #end(): void {
    this.#process.kill('SIGKILL');
    setTimeout(() => this.#giveUp('it does not end although it was killed'), KILL_MS).unref();
  }

  #receive(message: FromEngine): void {
    if (message.kind === 'ready' || message.kind === 'failed') return;
    const pending = this.#pending.get(message.id);
    if (message.kind === 'progress') {
      pending?.watchdog.refresh();
      pending?.progress?.(message.stage, message.done, message.total);
      return;
    }
    clearTimeout(pending?.watchdog);
    this.#pending.delete(message.id);
    if (message.kind === 'result') pending?.resolve(message.value);
    else pending?.reject(fromFault(message.fault));
  }
}

/** A channel that breaks while it is written to is no news: the process's end tells. */
function post(child: ChildProcess, message: ToEngine): void {
  if (child.connected) child.send(message, () => {});
}

function gone(reason: string): UnetdError {
  return new UnetdError('ERR_ENGINE_DOWN', `The engine process ended: ${reason}.`);
}

/** Of this very file: `.ts` from the sources, `.js` from a build. */
function extension(): string {
  return import.meta.url.endsWith('.ts') ? '.ts' : '.js';
}

function ownEngine(): string {
  return new URL(`./engine${extension()}`, import.meta.url).href;
}

/** The loader that lets node run the sources. */
function tsx(): string {
  const path = createRequire(import.meta.url).resolve('tsx');
  return pathToFileURL(path).href;
}
