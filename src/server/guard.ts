/**
 * Who may talk to the server: bearer token, Host and Origin headers, and where it may listen. Pure functions of headers;
 * sends no answers.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import { isIP } from 'node:net';
import { UnetdError } from '../errors.ts';

export interface GuardOptions {
  readonly host: string;
  readonly token: string | undefined;
  /** Names beside IP addresses, localhost and `host` that a Host header may have. */
  readonly allowHosts: readonly string[];
  /** Origins of web pages beside the server's own; `*` allows all. */
  readonly allowOrigins: readonly string[];
}

/** Why a request is refused, with the HTTP status to say it with. */
export interface Refusal {
  readonly status: number;
  readonly reason: string;
}

interface Headers {
  readonly host?: string | undefined;
  readonly origin?: string | undefined;
  readonly authorization?: string | undefined;
}

/** Host and Origin: keeps web pages of others from using the server through a visitor's browser. */
export function refusePlace(headers: Headers, options: GuardOptions): Refusal | null {
  const host = hostName(headers.host);
  const names = ['localhost', options.host, ...options.allowHosts].map((name) => name.toLowerCase());
  // A page can rebind a DNS name to this address, but not a literal address.
  if (host === null || (isIP(host) === 0 && !names.includes(host))) {
    return {
      status: 403,
      reason: `Host "${headers.host ?? ''}" is not allowed; start the server with --allow-host for that name.`,
    };
  }
  const { origin } = headers;
  if (origin === undefined || options.allowOrigins.some((allowed) => allowed === '*' || allowed === origin))
    return null;
  if (URL.canParse(origin) && new URL(origin).host === headers.host?.toLowerCase()) return null;
  return {
    status: 403,
    reason: `Origin "${origin}" is not allowed; start the server with --allow-origin for that page.`,
  };
}

export function refuseToken(headers: Headers, token: string | undefined): Refusal | null {
  if (token === undefined) return null;
  const given = /^Bearer +(\S+) *$/i.exec(headers.authorization ?? '')?.[1];
  // Equal-length digests: the comparison tells neither the length nor a common beginning.
  if (given !== undefined && timingSafeEqual(sha256(given), sha256(token))) return null;
  const found = given === undefined ? 'none was sent' : 'the one sent is wrong';
  return { status: 401, reason: `This server needs "Authorization: Bearer TOKEN": ${found}.` };
}

/** ERR_BAD_REQUEST where a server without a token would be reachable from other machines, or no client could send the token. */
export function checkListen(host: string, token: string | undefined): void {
  if (token !== undefined && !/^[\x21-\x7e]+$/.test(token)) {
    throw new UnetdError(
      'ERR_BAD_REQUEST',
      'The token must be one or more visible ASCII characters without spaces; leave --token and UNETD_TOKEN out for none.',
    );
  }
  if (token !== undefined || isLoopback(host)) return;
  throw new UnetdError(
    'ERR_BAD_REQUEST',
    `Refusing to listen on ${host} without a token, as everyone who reaches it could use it; set --token or UNETD_TOKEN, or listen on 127.0.0.1.`,
  );
}

export function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'));
}

/** Name or address of a Host header, lower case, without port and brackets. */
function hostName(header: string | undefined): string | null {
  const match = /^(?:\[([0-9a-f:.]+)\]|([^:[\]/@\s]+))(?::\d{1,5})?$/i.exec(header ?? '');
  return (match?.[1] ?? match?.[2])?.toLowerCase() ?? null;
}

function sha256(text: string): Buffer {
  return createHash('sha256').update(text).digest();
}
