/**
 * The plain HTTP side of the port: health, readiness, metrics, the model list, statistics and the monitor page. Reads only;
 * everything that acts goes over the WebSocket.
 */
import { readFile } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { UnetdError } from '../errors.ts';
import { type GuardOptions, refusePlace, refuseToken } from './guard.ts';
import { listModels, type Services } from './operations.ts';

export interface HttpContext {
  readonly services: Services;
  readonly guard: GuardOptions;
  readonly isReady: () => boolean;
  readonly metricsText: () => Promise<string>;
}

interface Page {
  readonly status: number;
  readonly type: string;
  readonly body: string;
}

/** Beside both `src/` and `dist/`. */
const MONITOR_PAGE: URL = new URL('../../assets/monitor.html', import.meta.url);

const HEADERS = {
  'cache-control': 'no-store',
  'x-content-type-options': 'nosniff',
  'content-security-policy':
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
} as const;

/** These say nothing about anyone's work, so probes and browsers may have them without a token. */
const PUBLIC_PATHS: ReadonlySet<string> = new Set(['/', '/healthz', '/readyz']);

export async function answerHttp(
  context: HttpContext,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const page = await pageFor(context, request).catch((error: unknown): Page => {
    const { code, message } = UnetdError.from(error);
    return json(500, { error: { code, message } });
  });
  response.writeHead(page.status, {
    ...HEADERS,
    'content-type': page.type,
    'content-length': Buffer.byteLength(page.body),
    ...(page.status === 401 ? { 'www-authenticate': 'Bearer' } : {}),
    ...(page.status === 405 ? { allow: 'GET, HEAD' } : {}),
  });
  response.end(request.method === 'HEAD' ? undefined : page.body);
}

async function pageFor(context: HttpContext, request: IncomingMessage): Promise<Page> {
  const path = (request.url ?? '/').split('?')[0]!;
  const { guard, services } = context;
  const refusal =
    refusePlace(request.headers, guard) ??
    (PUBLIC_PATHS.has(path) ? null : refuseToken(request.headers, guard.token));
  if (refusal !== null) return text(refusal.status, refusal.reason);
  if (request.method !== 'GET' && request.method !== 'HEAD')
    return text(405, 'Only GET and HEAD are served here.');
  switch (path) {
    case '/':
      return { status: 200, type: 'text/html; charset=utf-8', body: await readFile(MONITOR_PAGE, 'utf8') };
    case '/healthz':
      return text(200, 'ok');
    case '/readyz':
      return context.isReady()
        ? text(200, 'ready')
        : text(503, 'not ready: the engine restarts or the server shuts down');
    case '/metrics':
      return { status: 200, type: services.metrics.contentType, body: await context.metricsText() };
    case '/v1/models':
      return json(200, { models: await listModels(services) });
    case '/v1/stats':
      return json(200, await services.stats());
    case '/v1':
      return text(426, 'This is the WebSocket address: connect with the subprotocol unetd.v1.');
    default:
      return text(
        404,
        'Nothing is here. There are /, /healthz, /readyz, /metrics, /v1/models, /v1/stats and the WebSocket /v1.',
      );
  }
}

function text(status: number, body: string): Page {
  return { status, type: 'text/plain; charset=utf-8', body: `${body}\n` };
}

function json(status: number, value: unknown): Page {
  return { status, type: 'application/json', body: JSON.stringify(value) };
}
