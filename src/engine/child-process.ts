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
}

interface Pending {
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: UnetdError) => void;
  readonly progress: Progress | undefined;
}

const CLOSE_MS = 5000;
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

  private constructor(child: ChildProcess, device: DeviceInfo, exited: Promise<string>) {
    this.#process = child;
    this.device = device;
    this.#pending = new Map();
    this.exited = exited.then((reason) => {
      this.#hasExited = true;
      for (const { reject } of this.#pending.values()) reject(gone(reason));
      this.#pending.clear();
      return reason;
    });
    child.on('message', (message: FromEngine) => this.#receive(message));
  }

  /** Rejects with the engine's own error where it could not be made, ERR_ENGINE_DOWN where the process ended before that. */
  static async start({ engine, module, output }: ChildOptions): Promise<Child> {
    const child = fork(new URL(`./child${extension()}`, import.meta.url), [module ?? ownEngine()], {
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
    try {
      post(child, { kind: 'start', options: engine ?? {} });
      return new Child(child, await ready, exited);
    } catch (error) {
      child.kill('SIGKILL');
      throw error;
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

  /** Rejects with the engine's error, or ERR_ENGINE_DOWN when the process ends first. */
  call(method: EngineMethod, args: CallArguments, progress: Progress | undefined): Promise<unknown> {
    if (this.#hasExited) return Promise.reject(gone('it had ended before'));
    return new Promise((resolve, reject) => {
      const id = this.#nextId++;
      this.#pending.set(id, { resolve, reject, progress });
      post(this.#process, { kind: 'call', id, method, args });
    });
  }

  /** Ends the process at once. */
  kill(): void {
    this.#process.kill('SIGKILL');
  }

  /** Lets the engine close, and ends the process if it does not. */
  async close(): Promise<void> {
    if (this.#hasExited) return;
    const timer = setTimeout(() => this.kill(), CLOSE_MS);
    post(this.#process, { kind: 'close' });
    await this.exited;
    clearTimeout(timer);
  }

  #receive(message: FromEngine): void {
    if (message.kind === 'ready' || message.kind === 'failed') return;
    const pending = this.#pending.get(message.id);
    if (message.kind === 'progress') {
      pending?.progress?.(message.stage, message.done, message.total);
      return;
    }
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
