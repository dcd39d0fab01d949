/**
 * Puts a server together and runs it: library, residents, scheduler, HTTP and WebSocket on one port, and its orderly end.
 * Makes no engine (it is given one) and handles no process signals (the command line does).
 */
import { readFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { totalmem } from 'node:os';
import type { EngineApi, EngineHealth } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';
import { type Clock, SYSTEM_CLOCK } from './clock.ts';
import { checkListen, type GuardOptions } from './guard.ts';
import { answerHttp, type HttpContext } from './http.ts';
import { Library } from './library.ts';
import type { Logger } from './log.ts';
import { Metrics, type Observed } from './metrics.ts';
import type { Services } from './operations.ts';
import { type DtypeChoice, type Hello, PROTOCOL_VERSION, type ServerStats, SOCKET_PATH } from './protocol.ts';
import { Residents } from './residents.ts';
import { Scheduler } from './scheduler.ts';
import type { SessionLimits } from './session.ts';
import { Sockets } from './sockets.ts';
import { watched } from './watched.ts';

export interface ServeOptions {
  /** Ended by whoever made it, after the server. */
  readonly engine: EngineApi & Partial<EngineHealth>;
  readonly log: Logger;
  readonly models: readonly string[];
  readonly loras?: readonly string[];
  readonly host?: string;
  /** 0 for any free port. */
  readonly port?: number;
  readonly token?: string;
  readonly dtype?: DtypeChoice;
  readonly maxBatch?: number;
  readonly batchWaitMs?: number;
  readonly queueLimit?: number;
  readonly maxConnections?: number;
  readonly allowHosts?: readonly string[];
  readonly allowOrigins?: readonly string[];
  readonly limits?: Partial<SessionLimits>;
  readonly uploadQuotaBytes?: number;
  readonly pingMs?: number;
  readonly highWaterBytes?: number;
  /** Memory of this process for the requests of all connections, and as much again for what they keep; an eighth of the machine's. */
  readonly memoryBytes?: number;
  /** How long `drain` waits for open requests before it closes anyway. */
  readonly drainMs?: number;
  readonly clock?: Clock;
}

export interface RunningServer {
  readonly port: number;
  /** `ws://HOST:PORT/v1`, as clients connect to it. */
  readonly url: string;
  /** Takes no new requests, finishes open ones, closes the connections and the port. */
  drain(): Promise<void>;
  /** Ends at once: open requests are not answered. */
  close(): Promise<void>;
}

export const DEFAULTS = {
  host: '127.0.0.1',
  port: 8700,
  maxBatch: 8,
  queueLimit: 1024,
  maxConnections: 256,
  maxMessageBytes: 268_435_456,
  maxInFlight: 32,
  maxKeptBytes: 268_435_456,
  uploadQuotaBytes: 17_179_869_184,
  pingMs: 20_000,
  highWaterBytes: 67_108_864,
  drainMs: 120_000,
} as const;
const CLOSE_GRACE_MS = 2000;
const SPARE_CONNECTIONS = 64;
/** Of a plain HTTP request; an upgraded connection has limits of its own. */
const HTTP_LIMITS = {
  maxHeaderSize: 16_384,
  headersTimeout: 10_000,
  requestTimeout: 20_000,
  connectionsCheckingInterval: 5000,
} as const;

/** Listens and resolves when clients can connect. ERR_BAD_REQUEST where the options cannot work. */
export async function serve(options: ServeOptions): Promise<RunningServer> {
  const guard = guardOf(options);
  checkListen(guard.host, guard.token);
  const clock = options.clock ?? SYSTEM_CLOCK;
  const { library, scheduler, sockets, http: context, state } = await assemble(options, guard, clock);
  const http = createServer(HTTP_LIMITS, (request, response) => {
    void answerHttp(context, request, response);
  });
  // Some places are left for probes, and to refuse WebSockets with a reason.
  http.maxConnections = (options.maxConnections ?? DEFAULTS.maxConnections) + SPARE_CONNECTIONS;
  http.on('upgrade', (request, stream, head) => sockets.upgrade(request, stream, head));
  const port = await listen(http, guard.host, options.port ?? DEFAULTS.port).catch(async (error: unknown) => {
    await library.close();
    throw error;
  });
  const close = onceOnly(async () => {
    state.draining = true;
    await Promise.all([sockets.close(CLOSE_GRACE_MS), closePort(http)]);
    await library.close();
  });
  const drain = onceOnly(async () => {
    state.draining = true;
    options.log.info({ open: scheduler.queue }, 'draining');
    await within(sockets.idle(), options.drainMs ?? DEFAULTS.drainMs, clock);
    await close();
  });
  return { port, url: `ws://${urlHost(guard.host)}:${port}${SOCKET_PATH}`, drain, close };
}

interface Assembly {
  readonly library: Library;
  readonly scheduler: Scheduler;
  readonly sockets: Sockets;
  readonly http: HttpContext;
  readonly state: { draining: boolean };
}

/** Every part of the server, joined but not listening. */
async function assemble(options: ServeOptions, guard: GuardOptions, clock: Clock): Promise<Assembly> {
  const { log } = options;
  const library = await Library.open({
    models: options.models,
    loras: options.loras ?? [],
    uploadQuotaBytes: options.uploadQuotaBytes ?? DEFAULTS.uploadQuotaBytes,
  });
  const metrics = new Metrics();
  const { engine: given } = options;
  const engine = watched(given, metrics, log);
  let engineStats = await engine.stats();
  const residents = new Residents(engine, library, clock, options.dtype ?? 'auto');
  const scheduler = new Scheduler(engine, residents, metrics, clock, {
    maxBatch: options.maxBatch ?? DEFAULTS.maxBatch,
    batchWaitMs: options.batchWaitMs ?? 0,
    queueLimit: options.queueLimit ?? DEFAULTS.queueLimit,
  });
  const state = { draining: false };
  const isReady = (): boolean => !state.draining && (given.alive ?? true);
  const observe = (): Observed => ({
    server: serverName(),
    ready: isReady(),
    restarts: given.restarts ?? 0,
    peers: sockets.peers,
    traffic: sockets.traffic,
    queue: scheduler.queue,
    waitingLoras: scheduler.waitingLoras,
    incoming: sockets.incoming,
    kept: sockets.kept,
    uploads: library.uploads.usage,
  });
  const stats = async (): Promise<ServerStats> => {
    // Whoever watches an engine that is down sees it as it was last.
    engineStats = await engine.stats().catch(() => engineStats);
    return metrics.stats(observe(), engineStats);
  };
  const services: Services = {
    library,
    residents,
    scheduler,
    metrics,
    log,
    stats,
    isDraining: () => state.draining,
  };
  const limits: SessionLimits = { ...DEFAULTS, ...options.limits };
  const hello = (): Hello => helloOf(engine, limits);
  const { maxConnections, pingMs, highWaterBytes } = { ...DEFAULTS, ...options };
  const sockets = new Sockets({
    services,
    guard,
    limits,
    hello,
    maxConnections,
    pingMs,
    highWaterBytes,
    memoryBytes: options.memoryBytes ?? totalmem() / 8,
    log,
  });
  const metricsText = async (): Promise<string> => metrics.text(await stats());
  return { library, scheduler, sockets, http: { services, guard, isReady, metricsText }, state };
}

/** `unetd/VERSION` of this package. */
export function serverName(): string {
  return NAME;
}

const NAME = readName();

function readName(): string {
  const file = new URL('../../package.json', import.meta.url);
  const { name, version } = JSON.parse(readFileSync(file, 'utf8')) as { name: string; version: string };
  return `${name}/${version}`;
}

function guardOf({ host, token, allowHosts, allowOrigins }: ServeOptions): GuardOptions {
  return {
    host: host ?? DEFAULTS.host,
    token,
    allowHosts: allowHosts ?? [],
    allowOrigins: allowOrigins ?? [],
  };
}

function helloOf(engine: EngineApi, { maxMessageBytes, maxInFlight }: SessionLimits): Hello {
  return {
    event: 'hello',
    protocol: PROTOCOL_VERSION,
    server: serverName(),
    device: engine.device,
    limits: { maxMessageBytes, maxInFlight },
  };
}

function listen(server: Server, host: string, port: number): Promise<number> {
  return new Promise((resolve, reject) => {
    server.once('error', (error: NodeJS.ErrnoException) => {
      const reason =
        error.code === 'EADDRINUSE' ? 'another program uses it; choose another --port' : error.message;
      reject(new UnetdError('ERR_BAD_REQUEST', `Cannot listen on ${host} port ${port}: ${reason}.`));
    });
    server.listen(port, host, () => resolve((server.address() as AddressInfo).port));
  });
}

function closePort(server: Server): Promise<void> {
  return new Promise((resolve) => {
    server.close(() => resolve());
    server.closeAllConnections();
  });
}

/** Addresses that mean "all" are no addresses to connect to. */
function urlHost(host: string): string {
  if (host === '0.0.0.0') return '127.0.0.1';
  if (host === '::') return '[::1]';
  return host.includes(':') ? `[${host}]` : host;
}

/** Waits for a promise, but no longer than that. */
async function within(promise: Promise<void>, ms: number, clock: Clock): Promise<void> {
  let cancel = (): void => {};
  const over = new Promise<void>((resolve) => {
    cancel = clock.after(ms, resolve);
  });
  await Promise.race([promise, over]);
  cancel();
}

function onceOnly(action: () => Promise<void>): () => Promise<void> {
  let done: Promise<void> | undefined;
  return () => {
    done ??= action();
    return done;
  };
}
