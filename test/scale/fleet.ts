/** Several servers as processes of their own, and the shipped HAProxy configuration in front of them. No test itself. */
import { execFileSync, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ServerStats } from '../../src/server/protocol.ts';
import { look } from '../../src/top.ts';
import { endOf, freePort, launch, ROOT } from '../launch.ts';

export const SHIPPED: string = `${ROOT}ops/haproxy.cfg`;
export const STAND_IN: readonly string[] = [
  '--engine-module',
  new URL('../server/stand-in-engine.ts', import.meta.url).href,
];

export interface ServerProcess {
  readonly port: number;
  readonly url: string;
  readonly exit: Promise<number | null>;
  readonly hasEnded: () => boolean;
  /** The statistics, while it runs. */
  stats(): Promise<ServerStats>;
  kill(signal: NodeJS.Signals): void;
}

export async function startServer(port: number, args: readonly string[]): Promise<ServerProcess> {
  const { child, url, exited: exit } = await launch('--port', String(port), ...args);
  return {
    port: Number(new URL(url).port),
    url,
    exit,
    hasEnded: () => child.exitCode !== null || child.signalCode !== null,
    stats: () => look({ url }),
    kill: (signal) => {
      child.kill(signal);
    },
  };
}

export interface Balancer {
  readonly url: string;
  /** Sends a line to its admin socket and gives the answer. */
  command(line: string): Promise<string>;
  /** Name of a server -> what HAProxy makes of it: UP, DOWN, DRAIN, ... */
  states(): Promise<ReadonlyMap<string, string>>;
  stop(): Promise<void>;
}

/**
 * The shipped configuration with other addresses and another place for its socket; nothing else is changed. `tls` is a further `bind`
 * line and the file of its certificate.
 */
export async function startBalancer(
  ports: readonly number[],
  tls?: { readonly bind: string; readonly certificate: string },
): Promise<Balancer> {
  const dir = mkdtempSync(join(tmpdir(), 'unetd-haproxy-'));
  const socket = join(dir, 'admin.sock');
  const port = await freePort();
  const shipped = readFileSync(SHIPPED, 'utf8');
  const [, line = ''] = /^( *server s1 .*\n)/m.exec(shipped) ?? [];
  const servers = ports.map((each, i) => line.replace('s1', `s${i + 1}`).replace('8701', String(each)));
  const config = shipped
    .replace(/(^ *server s\d .*\n)+/m, servers.join(''))
    .replace('bind :8700', tls === undefined ? `bind 127.0.0.1:${port}` : secured(tls, port))
    .replaceAll('/run/haproxy/unetd.sock', socket);
  const file = join(dir, 'haproxy.cfg');
  writeFileSync(file, config);
  execFileSync('haproxy', ['-c', '-q', '-f', file]);
  const child = spawn('haproxy', ['-db', '-f', file], { stdio: ['ignore', 'pipe', 'pipe'] });
  // Its log has to go somewhere.
  child.stdout.resume();
  child.stderr.resume();
  const exit = endOf(child);
  const command = (text: string): Promise<string> => ask(socket, text);
  const states = async (): Promise<ReadonlyMap<string, string>> => {
    const rows = (await command('show stat')).split('\n').map((row) => row.split(','));
    const status = rows[0]!.indexOf('status');
    return new Map(rows.filter((row) => /^s\d$/.test(row[1] ?? '')).map((row) => [row[1]!, row[status]!]));
  };
  const stop = async (): Promise<void> => {
    child.kill('SIGKILL');
    await exit;
    rmSync(dir, { recursive: true, force: true });
  };
  const url = tls === undefined ? `ws://127.0.0.1:${port}/v1` : `wss://localhost:${port}/v1`;
  const balancer = { url, command, states, stop };
  await until(async () => [...(await states()).values()].every((state) => state === 'UP'));
  return balancer;
}

function secured(
  { bind, certificate }: { readonly bind: string; readonly certificate: string },
  port: number,
): string {
  return bind.replace(':443', `127.0.0.1:${port}`).replace(/crt \S+/, `crt ${certificate}`);
}

/** Polls until it holds; an error counts as not yet. */
export async function until(holds: () => Promise<boolean>, timeoutMs = 20_000): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  let failure: unknown;
  while (performance.now() < deadline) {
    const held = await holds().catch((error: unknown) => {
      failure = error;
      return false;
    });
    if (held) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`${holds} did not come true within ${timeoutMs} ms`, { cause: failure });
}

function ask(socket: string, line: string): Promise<string> {
  return new Promise((resolve, reject) => {
    let text = '';
    const stream = createConnection(socket, () => stream.end(`${line}\n`));
    stream.on('data', (chunk) => {
      text += chunk;
    });
    stream.on('end', () => resolve(text));
    stream.on('error', reject);
  });
}
