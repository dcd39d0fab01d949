/**
 * A contender: a process that loads a work, and then runs it as often as it is asked to. One process each, since two copies
 * of Dawn do not live in one. Both ends of the line are here; what a work is, they do not know.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { writeSync } from 'node:fs';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { endOf, ROOT } from '../../test/launch.ts';
import type { Job } from './works.ts';

/** One run, from inputs in memory to results in memory. */
export interface Run {
  readonly ms: number;
  /** Processor time of the whole process meanwhile. */
  readonly cpuMs: number;
}

/** Replies go there, since libraries print to standard output. */
const REPLIES = 3;
/** How much of what it printed an error quotes. */
const QUOTED = 1500;

type Reply = { readonly error: string } | Run | Record<string, never>;

export class Contender {
  readonly #child: ChildProcess;
  readonly #replies: AsyncIterator<string>;
  #printed = '';

  /** `command` runs in the root of the repository. */
  constructor([program, ...args]: readonly [string, ...string[]]) {
    this.#child = spawn(program, args, { cwd: ROOT, stdio: ['pipe', 'pipe', 'pipe', 'pipe'] });
    void endOf(this.#child);
    this.#child.on('error', (error) => this.#note(String(error)));
    for (const stream of [this.#child.stdout!, this.#child.stderr!])
      stream.on('data', (chunk: Buffer) => this.#note(chunk.toString()));
    // Where the process has ended, its silence says so.
    this.#child.stdin!.on('error', () => {});
    const replies = createInterface({ input: this.#child.stdio[REPLIES] as Readable });
    this.#replies = replies[Symbol.asyncIterator]();
  }

  /** Loads a work, runs it to warm up, and writes its result, float32, to `job.out`. */
  async load(job: Job): Promise<void> {
    await this.#ask({ load: job });
  }

  async run(): Promise<Run> {
    return (await this.#ask({ run: true })) as Run;
  }

  async unload(): Promise<void> {
    await this.#ask({ unload: true });
  }

  close(): void {
    this.#child.kill('SIGKILL');
  }

  #note(text: string): void {
    this.#printed = (this.#printed + text).slice(-QUOTED);
  }

  async #ask(question: unknown): Promise<Reply> {
    this.#child.stdin!.write(`${JSON.stringify(question)}\n`);
    const { value, done } = await this.#replies.next();
    const reply = done ? { error: 'the process ended' } : (JSON.parse(value) as Reply);
    if ('error' in reply) throw new Error(`${reply.error}\n${this.#printed}`.trim());
    return reply;
  }
}

/** A loaded work. */
export interface Loaded {
  /** Once, until the result lies in memory, as it is stored. */
  readonly run: () => Promise<unknown>;
  /** In f32: the result of one application where `run` repeats it; also warms up. */
  readonly result: () => Promise<Float32Array>;
  readonly close: () => Promise<void>;
}

/** The other end: answers questions until standard input ends. */
export async function contend(
  load: (job: Job) => Promise<Loaded>,
  write: (path: string, values: Float32Array) => void,
): Promise<void> {
  let loaded: Loaded | undefined;
  const answer = async (question: { readonly load?: Job; readonly run?: true }): Promise<Reply> => {
    if (question.load) {
      loaded = await load(question.load);
      write(question.load.out, await loaded.result());
      return {};
    }
    if (question.run) {
      const cpu = process.cpuUsage();
      const begun = performance.now();
      await loaded!.run();
      const ms = performance.now() - begun;
      const { user, system } = process.cpuUsage(cpu);
      return { ms, cpuMs: (user + system) / 1000 };
    }
    await loaded?.close();
    loaded = undefined;
    return {};
  };
  for await (const line of createInterface({ input: process.stdin })) {
    const reply = await answer(JSON.parse(line)).catch((error: unknown) => ({ error: String(error) }));
    writeSync(REPLIES, `${JSON.stringify(reply)}\n`);
  }
}
