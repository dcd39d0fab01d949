/**
 * Starts the real server with the real engine through its command line, as a user does, and ends it.
 * It is not a stand-in: nothing of the server runs in the process of the tests.
 */
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { Client, type OpenOptions } from './client.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
export const ASSETS: string = `${ROOT}demo/assets/`;
export const MODEL = 'emoji-unet.safetensors';

export interface Server {
  readonly url: string;
  /** http://HOST:PORT */
  readonly http: string;
  readonly pid: number;
  readonly log: () => string;
  open(options?: OpenOptions): Promise<Client>;
  /** Sends SIGTERM, once, without waiting. */
  terminate(): void;
  /** Gives the exit code after SIGTERM. */
  stop(): Promise<number | null>;
}

export async function serve(...args: readonly string[]): Promise<Server> {
  const { UNETD_TOKEN: _token, ...environment } = process.env;
  const child = spawn(
    process.execPath,
    [
      ...['--import', 'tsx', 'src/cli.ts', 'serve', '--port', '0'],
      ...['--models', 'demo/assets/models', '--loras', 'demo/assets/loras', ...args],
    ],
    { cwd: ROOT, env: environment, stdio: ['ignore', 'pipe', 'pipe'] },
  );
  let log = '';
  const exited = new Promise<number | null>((resolve) => child.on('exit', resolve));
  const orphaned = (): void => {
    child.kill('SIGKILL');
  };
  process.on('exit', orphaned);
  void exited.then(() => process.off('exit', orphaned));
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
  let terminated = false;
  const terminate = (): void => {
    if (!terminated) child.kill('SIGTERM');
    terminated = true;
  };
  return {
    url,
    http: url.replace('ws:', 'http:').replace('/v1', ''),
    pid: child.pid!,
    log: () => log,
    open: (options) => Client.open(url, options),
    terminate,
    stop: async () => {
      terminate();
      const force = setTimeout(() => child.kill('SIGKILL'), 20_000);
      const code = await exited;
      clearTimeout(force);
      return code;
    },
  };
}
