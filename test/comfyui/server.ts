/** The server under test: `unetd serve` as a user starts it, on the models of the tests, with its numbers over HTTP. */
import type { ServerStats } from '../../src/server/protocol.ts';
import { freePort, ROOT } from '../launch.ts';
import { Child } from './child.ts';

export const MODELS: string = `${ROOT}.cache/comfyui/models`;
const START_TIMEOUT_MS = 60_000;

export class UnetdServer {
  readonly port: number;
  readonly #models: string;
  #child: Child;

  private constructor(port: number, models: string, child: Child) {
    this.port = port;
    this.#models = models;
    this.#child = child;
  }

  static async start(models: string = MODELS): Promise<UnetdServer> {
    const port = await freePort();
    return new UnetdServer(port, models, await launch(port, models));
  }

  /** As a setting of the nodes. */
  get url(): string {
    return `ws://127.0.0.1:${this.port}/v1`;
  }

  /** Ends the process without warning, as a crash would. */
  kill(): Promise<void> {
    return this.#child.end('SIGKILL');
  }

  /** Starts it again on the same port; it knows nothing of what it held before. */
  async restart(): Promise<void> {
    this.#child = await launch(this.port, this.#models);
  }

  async stats(): Promise<ServerStats> {
    return (await this.#get('/v1/stats').then((response) => response.json())) as ServerStats;
  }

  /** How many requests of an operation were answered, with whatever result. */
  async requests(operation: string): Promise<number> {
    const text = await this.#get('/metrics').then((response) => response.text());
    const lines = text.matchAll(
      new RegExp(`^unetd_requests_total\\{op="${operation}",[^}]*\\} (\\d+)$`, 'gm'),
    );
    return [...lines].reduce((sum, [, count]) => sum + Number(count), 0);
  }

  close(): Promise<void> {
    return this.#child.end('SIGTERM');
  }

  #get(path: string): Promise<Response> {
    return fetch(`http://127.0.0.1:${this.port}${path}`);
  }
}

async function launch(port: number, models: string): Promise<Child> {
  const args = ['serve', '--models', models, '--dtype', 'f32', '--port', String(port), '--log-level', 'warn'];
  const child = new Child('unetd', process.execPath, ['--import', 'tsx', 'src/cli.ts', ...args], ROOT);
  await child.until('it listened', START_TIMEOUT_MS, async () =>
    child.output.includes('unetd listening on') ? true : undefined,
  );
  return child;
}
