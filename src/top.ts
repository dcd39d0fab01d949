/**
 * `unetd top`: what a running server does, in the terminal. Reads `GET /v1/stats` and draws; what the numbers mean is in
 * `docs/OPERATION.md`, and the monitor page shows the same ones.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { UnetdError } from './errors.ts';
import { ageText, countText, durationText, rateText, sizeText } from './format.ts';
import type { ServerStats } from './server/protocol.ts';

export interface TopOptions {
  /** `ws://HOST:PORT/v1` as clients have it, or `http://HOST:PORT`. */
  readonly url: string;
  readonly token?: string;
  readonly intervalMs: number;
  readonly once: boolean;
  readonly json: boolean;
}

interface Terminal {
  readonly isTTY?: boolean;
  readonly columns?: number;
  readonly rows?: number;
  write(text: string): unknown;
}

/** Samples that rates look back on: a step may take longer than one interval. */
const WINDOW = 6;
const TIMEOUT_MS = 10_000;
/** A GPU without a stated budget reports the largest whole number instead. */
const NO_LIMIT = 2 ** 50;
const MIN_NAME = 12;
const HOME = '\x1b[H';
const TO_LINE_END = '\x1b[K';
const TO_SCREEN_END = '\x1b[J';

/** Shows the server until `signal` aborts, or once. Rejects where a single look fails. */
export async function top(
  options: TopOptions,
  terminal: Terminal = process.stdout,
  signal?: AbortSignal,
): Promise<void> {
  const { once, json, intervalMs } = options;
  const past: ServerStats[] = [];
  while (!signal?.aborted) {
    try {
      past.push(await look(options));
      if (past.length > WINDOW) past.shift();
      // Rates need two looks.
      if (json) terminal.write(`${JSON.stringify(past.at(-1))}\n`);
      else if (!once || past.length > 1) draw(screen(past, terminal.columns ?? 100), terminal, once);
      if (once && (json || past.length > 1)) return;
    } catch (error) {
      if (once) throw error;
      past.length = 0;
      draw([UnetdError.from(error).message], terminal, json);
    }
    await sleep(intervalMs);
  }
}

/** The statistics of the server. ERR_BAD_REQUEST, ERR_UNAUTHORIZED, ERR_DISCONNECTED. */
export async function look({ url, token }: Pick<TopOptions, 'url' | 'token'>): Promise<ServerStats> {
  const address = statsAddress(url);
  const headers = token === undefined ? {} : { authorization: `Bearer ${token}` };
  let response: Response;
  try {
    response = await fetch(address, { headers, signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch (error) {
    const { cause } = error as { cause?: { message?: string } };
    throw new UnetdError(
      'ERR_DISCONNECTED',
      `Cannot reach ${address}: ${cause?.message || UnetdError.from(error).message}`,
    );
  }
  if (response.ok) return (await response.json()) as ServerStats;
  const code = response.status === 401 ? 'ERR_UNAUTHORIZED' : 'ERR_DISCONNECTED';
  throw new UnetdError(code, `${address} answers ${response.status}: ${(await response.text()).trim()}`);
}

function statsAddress(url: string): string {
  // Clients may have several addresses, separated by commas: the first one is looked at.
  const match = /^(?:ws|http)(s?):\/\/([^/?#]+)(?:\/v1)?\/?$/.exec(url.split(',')[0]!.trim());
  if (match !== null) return `http${match[1]}://${match[2]}/v1/stats`;
  throw new UnetdError('ERR_BAD_REQUEST', `"${url}" is no address like ws://127.0.0.1:8700/v1.`);
}

function draw(lines: readonly string[], terminal: Terminal, plain: boolean): void {
  const moving = terminal.isTTY === true && !plain;
  const text = lines
    .slice(0, moving ? (terminal.rows ?? 50) - 1 : undefined)
    .map((line) => `${line}${moving ? TO_LINE_END : ''}\n`)
    .join('');
  terminal.write(moving ? `${HOME}${text}${TO_SCREEN_END}` : text);
}

/** The lines of one screen, from the last statistics and those before. */
export function screen(past: readonly ServerStats[], columns: number): readonly string[] {
  const now = past.at(-1)!;
  const before = past[0]!;
  const seconds = (now.uptimeMs - before.uptimeMs) / 1000;
  // An engine that started anew counts from zero.
  const growth = (of: (stats: ServerStats) => number): number =>
    seconds > 0 ? Math.max(0, of(now) - of(before)) / seconds : 0;
  const lines = [
    ...summary(now, growth),
    '',
    ...table(
      [['MODEL', 'STORAGE', 'SIZE', 'IMAGES', 'GPU/STEP'], ...modelRows(now)],
      'none loaded: the first request loads one',
      columns,
    ),
    '',
    ...table(
      [['CONNECTION', 'FROM', 'OPEN', 'IMAGES/S', 'IN/S', 'OUT/S'], ...peerRows(now, growth)],
      'none',
      columns,
    ),
    ...errorLines(now),
  ];
  return lines.map((line) => printable(line).slice(0, columns));
}

type Growth = (of: (stats: ServerStats) => number) => number;

function summary(now: ServerStats, growth: Growth): readonly string[] {
  const { forwards, incoming, latencyMs, queue, traffic } = now;
  const { device, memory, turnover } = now.engine;
  const used = memory.weightBytes + memory.adapterBytes + memory.arenaBytes;
  const budget = memory.budgetBytes < NO_LIMIT ? ` of ${sizeText(memory.budgetBytes)}` : '';
  const busy = Math.min(100, growth((stats) => stats.engine.gpuMs) / 10);
  const state = now.ready ? 'ready' : 'NOT READY';
  return [
    `${now.server.replace('/', ' ')}  ${state}  up ${ageText(now.uptimeMs)}  ${device.name} (${device.backend})`,
    `images/s ${rateText(growth((stats) => stats.forwards.images))}  GPU busy ${busy.toFixed(0)} %  ` +
      `latency ${durationText(latencyMs.p50)}, 95 % ${durationText(latencyMs.p95)}  images/batch ${forwards.meanBatchImages.toFixed(2)}`,
    `waiting ${queue.requests} of ${countText(queue.limit)}  running ${queue.running}  connections ${now.connections}  ` +
      `in ${sizeText(traffic.receivedBytes)}  out ${sizeText(traffic.sentBytes)}  engine restarts ${now.restarts}`,
    `forwards ${countText(forwards.completed)} done, ${countText(forwards.failed)} failed, ${countText(forwards.cancelled)} cancelled  ` +
      `requests hold ${sizeText(incoming.bytes)} of ${sizeText(incoming.limitBytes)}`,
    `memory ${sizeText(used)}${budget}: weights ${sizeText(memory.weightBytes)}, LoRAs ${sizeText(memory.adapterBytes)}, ` +
      `activations ${sizeText(memory.arenaBytes)}  peak ${sizeText(memory.peakBytes)}`,
    `LoRAs loaded ${turnover.adapterLoads}, made room ${turnover.adapterEvictions}  ` +
      `models loaded ${turnover.modelLoads}, made room ${turnover.modelEvictions}`,
  ];
}

function modelRows({ engine, work }: ServerStats): readonly (readonly string[])[] {
  return engine.models.flatMap(({ model, dtype, sizeBytes, adapters }) => {
    const done = work.find((each) => each.model === model);
    const step = done === undefined || done.steps === 0 ? '-' : durationText(done.gpuMs / done.steps);
    return [
      [model, dtype, sizeText(sizeBytes), countText(done?.images ?? 0), step],
      ...adapters.map((adapter) => [`  ${adapter.lora}`, '', sizeText(adapter.sizeBytes), '', '']),
    ];
  });
}

function peerRows({ peers }: ServerStats, growth: Growth): readonly (readonly string[])[] {
  return peers.map(({ owner, from, openRequests }) => {
    const rate = (key: 'images' | 'receivedBytes' | 'sentBytes'): number =>
      growth((stats) => stats.peers.find((peer) => peer.owner === owner)?.[key] ?? 0);
    return [
      owner.replace('connection ', ''),
      from,
      String(openRequests),
      rateText(rate('images')),
      sizeText(rate('receivedBytes')),
      sizeText(rate('sentBytes')),
    ];
  });
}

function errorLines({ errors }: ServerStats): readonly string[] {
  const counts = Object.entries(errors).sort((a, b) => b[1] - a[1]);
  return counts.length === 0 ? [] : ['', `ERRORS  ${counts.map(([code, n]) => `${code} ${n}`).join('  ')}`];
}

/** Cells to the right of a name; the name is cut where the line would be too long. */
function table(rows: readonly (readonly string[])[], none: string, columns: number): readonly string[] {
  const [head = []] = rows;
  const [longest = 0, ...others] = head.map((_, at) => Math.max(...rows.map((row) => row[at]!.length)));
  const room = columns - others.reduce((sum, width) => sum + width + 2, 0);
  const width = Math.min(longest, Math.max(MIN_NAME, room));
  const lines = rows.map(([name = '', ...cells]) => {
    const cut = name.length > width ? `${name.slice(0, width - 1)}…` : name.padEnd(width);
    return [cut, ...cells.map((cell, at) => cell.padStart(others[at]!))].join('  ').trimEnd();
  });
  return rows.length > 1 ? lines : [...lines, none];
}

/** Names come from files and clients: a terminal must not take them for commands. */
function printable(text: string): string {
  return text.replace(/\p{Cc}/gu, '?');
}
