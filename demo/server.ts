/**
 * The server of the demo: `unetd serve` as a child process, started the way a user would, on a free port.
 * Finds the address in what the child prints and ends the child; its warnings go to our standard error.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';

export interface ServerProcess {
  /** ws://HOST:PORT/v1 */
  readonly url: string;
  /** Asks the child to drain and end; kills it after a grace period. */
  close(): Promise<void>;
}

const START_TIMEOUT_MS = 120_000;
const STOP_TIMEOUT_MS = 10_000;
const ROOT = fileURLToPath(new URL('..', import.meta.url));

/** Starts the CLI from source with `args` and waits until it has printed its address. */
export async function startServer(args: readonly string[]): Promise<ServerProcess> {
  const command = ['--import', 'tsx', 'src/cli.ts', 'serve', '--port', '0', '--log-level', 'warn', ...args];
  const child = spawn(process.execPath, command, { cwd: ROOT, stdio: ['ignore', 'pipe', 'inherit'] });
  try {
    return { url: await address(child), close: () => stop(child) };
  } catch (error) {
    await stop(child);
    throw error;
  }
}

/** The first ws:// address in the child's output; its output is in the error where there is none. */
function address(child: ChildProcess): Promise<string> {
  return new Promise((resolve, reject) => {
    let output = '';
    const fail = (why: string): void => reject(new Error(`The server ${why}. It printed:\n${output}`));
    const timer = setTimeout(() => fail(`gave no address within ${START_TIMEOUT_MS} ms`), START_TIMEOUT_MS);
    const read = (chunk: Buffer): void => {
      output = (output + chunk.toString()).slice(-8000);
      const found = /wss?:\/\/[\w.[\]:-]+:\d+\/v1/.exec(output);
      if (found === null) return;
      clearTimeout(timer);
      resolve(found[0]);
    };
    child.stdout?.on('data', read);
    child.once('error', (error) => fail(`could not be started (${error.message})`));
    child.once('exit', (code, signal) => {
      clearTimeout(timer);
      fail(`ended with ${signal ?? `code ${code}`}`);
    });
  });
}

async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const ended = once(child, 'exit');
  const timer = setTimeout(() => child.kill('SIGKILL'), STOP_TIMEOUT_MS);
  child.kill('SIGTERM');
  await ended;
  clearTimeout(timer);
}
