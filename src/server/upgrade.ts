/** Who may turn an HTTP request into a WebSocket, and how the others are told why not. Opens none itself. */
import { type IncomingMessage, STATUS_CODES } from 'node:http';
import type { Duplex } from 'node:stream';
import { type GuardOptions, type Refusal, refusePlace, refuseToken } from './guard.ts';
import { SOCKET_PATH, SUBPROTOCOL } from './protocol.ts';

export interface UpgradeRules {
  readonly guard: GuardOptions;
  readonly isDraining: boolean;
  readonly connections: number;
  readonly maxConnections: number;
}

/** Why the upgrade is refused, or null. */
export function refuseUpgrade(
  { url, headers }: IncomingMessage,
  { guard, isDraining, connections, maxConnections }: UpgradeRules,
): Refusal | null {
  const path = (url ?? '').split('?')[0];
  if (path !== SOCKET_PATH)
    return { status: 404, reason: `The WebSocket is at ${SOCKET_PATH}, not at ${path}.` };
  const refusal = refusePlace(headers, guard) ?? refuseToken(headers, guard.token);
  if (refusal !== null) return refusal;
  const offered = (headers['sec-websocket-protocol'] ?? '').split(',').map((name) => name.trim());
  if (!offered.includes(SUBPROTOCOL)) {
    const found = offered[0] === '' ? 'offered none' : `offered ${offered.join(', ').slice(0, 200)}`;
    return { status: 400, reason: `This server speaks the subprotocol ${SUBPROTOCOL}; the client ${found}.` };
  }
  if (isDraining)
    return { status: 503, reason: 'The server is shutting down; connect to another, or later.' };
  if (connections < maxConnections) return null;
  return { status: 503, reason: `The server has ${maxConnections} connections, its limit; connect later.` };
}

/** Answers with plain HTTP and closes. */
export function answerRefusal(stream: Duplex, { status, reason }: Refusal): void {
  const body = `${reason}\n`;
  stream.on('error', () => {});
  stream.end(
    [
      `HTTP/1.1 ${status} ${STATUS_CODES[status] ?? ''}`,
      'Connection: close',
      'Content-Type: text/plain; charset=utf-8',
      `Content-Length: ${Buffer.byteLength(body)}`,
      ...(status === 401 ? ['WWW-Authenticate: Bearer'] : []),
      '',
      body,
    ].join('\r\n'),
  );
}
