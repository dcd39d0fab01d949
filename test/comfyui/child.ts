/** A child process that announces when it is ready, with the end of its output at hand for messages. Knows no program. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';

const OUTPUT_CHARACTERS = 4000;
const STOP_TIMEOUT_MS = 10_000;

export class Child {
  readonly name: string;
  readonly pid: number;
  output = '';
  readonly #process: ChildProcess;

  constructor(
    name: string,
    command: string,
    args: readonly string[],
    cwd: string,
    environment: Readonly<Record<string, string>> = {},
  ) {
    this.name = name;
    const env = { ...process.env, ...environment };
    this.#process = spawn(command, args, { cwd, env, stdio: ['ignore', 'pipe', 'pipe'] });
    this.pid = this.#process.pid ?? -1;
    const keep = (chunk: Buffer): void => {
      this.output = (this.output + chunk.toString()).slice(-OUTPUT_CHARACTERS);
    };
    this.#process.stdout?.on('data', keep);
    this.#process.stderr?.on('data', keep);
    // Whatever ends the tests ends it too.
    process.once('exit', () => this.#process.kill('SIGKILL'));
    // Reported by `until`, which finds the process gone.
    this.#process.on('error', (error) => keep(Buffer.from(error.message)));
  }

  get isRunning(): boolean {
    return this.pid > 0 && this.#process.exitCode === null && this.#process.signalCode === null;
  }

  /** Asks `probe` again and again until it gives something; throws with the output where the process ends or time is up. */
  async until<T>(what: string, timeoutMs: number, probe: () => Promise<T | undefined>): Promise<T> {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const found = await probe();
      if (found !== undefined) return found;
      const late = performance.now() > deadline;
      if (late || !this.isRunning) {
        const why = late ? `took longer than ${timeoutMs} ms` : 'ended';
        throw new Error(`${this.name} ${why} before ${what}. It printed:\n${this.output}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  /** Resident memory in bytes: now, and the most it ever was. */
  memory(): { readonly now: number; readonly peak: number } {
    const status = readFileSync(`/proc/${this.pid}/status`, 'utf8');
    const bytes = (field: string): number =>
      1024 * Number(new RegExp(`${field}:\\s+(\\d+) kB`).exec(status)?.[1]);
    return { now: bytes('VmRSS'), peak: bytes('VmHWM') };
  }

  async end(signal: NodeJS.Signals): Promise<void> {
    if (!this.isRunning) return;
    const ended = once(this.#process, 'exit');
    const timer = setTimeout(() => this.#process.kill('SIGKILL'), STOP_TIMEOUT_MS);
    this.#process.kill(signal);
    await ended;
    clearTimeout(timer);
  }
}
