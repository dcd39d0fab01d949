/**
 * A WebSocket connection by hand: frames that break the protocol, that announce more than they hold, and that come byte by byte.
 * No test itself.
 */
import { once } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { below, pause, pick, type Random } from './scale.ts';

export async function openRaw(url: string): Promise<Socket> {
  const { hostname, port, host } = new URL(url);
  const stream = createConnection(Number(port), hostname);
  stream.on('error', () => {});
  stream.write(
    [
      ...['GET /v1 HTTP/1.1', `Host: ${host}`, 'Connection: Upgrade', 'Upgrade: websocket'],
      ...['Sec-WebSocket-Version: 13', `Sec-WebSocket-Key: ${'A'.repeat(22)}==`],
      ...['Sec-WebSocket-Protocol: unetd.v1', '', ''],
    ].join('\r\n'),
  );
  await textUntil(stream, /"event":"hello".*\}\}/);
  return stream;
}

/** A masked frame; the mask is zero, so that the payload stays readable. */
export function masked(first: number, payload: Uint8Array, length: number = payload.length): Buffer {
  const head = Buffer.alloc(14);
  head[0] = first;
  let size = 2;
  if (length < 126) head[1] = 0x80 | length;
  else if (length < 65_536) {
    head[1] = 0x80 | 126;
    size = head.writeUInt16BE(length, 2);
  } else {
    head[1] = 0x80 | 127;
    size = head.writeBigUInt64BE(BigInt(length), 2);
  }
  return Buffer.concat([head.subarray(0, size), Buffer.alloc(4), payload]);
}

const SOME = Buffer.from('{"id":"1","op":"loras.list"}');
/** Each ends the connection. */
const VIOLATIONS: readonly (() => Buffer)[] = [
  () => Buffer.concat([Buffer.from([0x81, SOME.length]), SOME]),
  () => masked(0xc1, SOME),
  () => masked(0x83, SOME),
  () => masked(0x80, SOME),
  () => masked(0x09, SOME),
  () => masked(0x89, Buffer.alloc(126)),
  () => masked(0x81, Buffer.from([0xff, 0xfe, 0xc0, 0x80])),
  () => masked(0x88, Buffer.from([0])),
  () => masked(0x88, Buffer.from([0, 5])),
  () => masked(0x82, SOME, 2 ** 40),
  () => masked(0x82, SOME, 700_000_000),
  () => Buffer.concat([masked(0x01, SOME), masked(0x81, SOME)]),
];

/** Breaks the protocol, and waits for the server to end the connection; rejects where it does not. */
export async function violate(url: string, random: Random): Promise<void> {
  const stream = await openRaw(url);
  const over = AbortSignal.timeout(30_000);
  const closed = once(stream, 'close', { signal: over });
  stream.resume();
  stream.write(pick(random, VIOLATIONS)());
  await closed;
}

/** Announces a message and goes away in the middle of it. */
export async function abandon(url: string, random: Random): Promise<void> {
  const stream = await openRaw(url);
  stream.write(masked(0x82, Buffer.alloc(below(random, 5000)), 10_000 + below(random, 200_000_000)));
  await pause(below(random, 20));
  stream.destroy();
}

/** Sends a request a few bytes at a time, and gives the text of the answer. */
export async function crawl(url: string, random: Random): Promise<string> {
  const stream = await openRaw(url);
  const answer = textUntil(stream, /"id":"1".*\}\}/);
  const whole = masked(0x81, SOME);
  for (let at = 0; at < whole.length; ) {
    const step = 1 + below(random, 5);
    stream.write(whole.subarray(at, at + step));
    at += step;
    await pause(below(random, 40));
  }
  const text = await answer;
  stream.destroy();
  return text;
}

/** What has come when it matches; pings of the server may come before, between and after. */
async function textUntil(stream: Socket, pattern: RegExp): Promise<string> {
  const over = AbortSignal.timeout(60_000);
  for (let text = ''; ; ) {
    if (pattern.test(text)) return text;
    const [data] = (await once(stream, 'data', { signal: over })) as [Buffer];
    text += data.toString('latin1');
  }
}
