/**
 * Starts the real server with the real engine through its command line, as a user does, and ends it.
 * It is not a stand-in: nothing of the server runs in the process of the tests.
 */
import { launch, ROOT } from '../launch.ts';
import { Client, type OpenOptions } from './client.ts';

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
  const models = ['--models', 'demo/assets/models', '--loras', 'demo/assets/loras'];
  const { child, url, log, exited } = await launch('--port', '0', ...models, ...args);
  let terminated = false;
  const terminate = (): void => {
    if (!terminated) child.kill('SIGTERM');
    terminated = true;
  };
  return {
    url,
    http: url.replace('ws:', 'http:').replace('/v1', ''),
    pid: child.pid!,
    log,
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
