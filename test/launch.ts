/**
 * `unetd serve` as a process of its own, from source or not, and loopback ports to put it on. It ends with the tests at the latest. What is
 * asked of the server is its users' business.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { fileURLToPath } from 'node:url';

export const ROOT: string = fileURLToPath(new URL('..', import.meta.url));

export interface Launched {
  readonly child: ChildProcess;
  /** `ws://HOST:PORT/v1`, as it printed it. */
  readonly url: string;
  /** All that it has printed. */
  readonly log: () => string;
  /** Its exit code. */
  readonly exited: Promise<number | null>;
}

/** Waits until it listens; rejects with what it printed where it ends before that. */
export function launch(...args: readonly string[]): Promise<Launched> {
  return launchCommand([process.execPath, '--import', 'tsx', 'src/cli.ts', 'serve', ...args], { cwd: ROOT });
}

/** Any command that serves. No token of the environment reaches it but one in `env`. */
export async function launchCommand(
  [program = '', ...args]: readonly string[],
  { cwd, env = {} }: { readonly cwd: string; readonly env?: Readonly<Record<string, string>> },
): Promise<Launched> {
  const { UNETD_TOKEN: _token, ...inherited } = process.env;
  const child = spawn(program, args, {
    cwd,
    env: { ...inherited, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const exited = endOf(child);
  let log = '';
  const url = await new Promise<string>((resolve, reject) => {
    const read = (chunk: Buffer): void => {
      log += chunk.toString();
      const line = /listening on (ws:\S+)/.exec(log);
      if (line) resolve(line[1]!);
    };
    child.stdout.on('data', read);
    child.stderr.on('data', read);
    void exited.then((code) => reject(new Error(`the server ended with ${code}:\n${log}`)));
  });
  return { child, url, log: () => log, exited };
}

/** The exit code of a child, which is killed when this process ends. */
export function endOf(child: ChildProcess): Promise<number | null> {
  const orphaned = (): void => {
    child.kill('SIGKILL');
  };
  process.on('exit', orphaned);
  return new Promise((resolve) =>
    child.on('exit', (code) => {
      process.off('exit', orphaned);
      resolve(code);
    }),
  );
}

/** A port on the loopback address that nothing listens on now. */
export async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}
