/**
 * Frames that no client should send: what cannot be read is answered with id null, and the connection lives on.
 * It is not about fields that are wrong in a readable request; see `operations.test.ts` and `forward.test.ts`.
 */
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { WebSocket } from 'ws';
import type { Client, Message } from './client.ts';
import { ASSETS, MODEL, type Server, serve } from './server.ts';
import { encode, errorOf, f32, frame, readTensors, type Tensors } from './tensors.ts';

const reference = readTensors(`${ASSETS}reference.safetensors`).tensors;
const inputs: Tensors = new Map(['x', 'timesteps', 'context'].map((name) => [name, reference.get(name)!]));
const ping: { at?: number; started: number } = { started: 0 };
let expected: Message;
let server: Server;
let client: Client;
let silent: WebSocket;

beforeAll(async () => {
  server = await serve();
  ping.started = Date.now();
  silent = new WebSocket(server.url, ['unetd.v1']);
  silent.on('ping', () => {
    ping.at ??= Date.now();
  });
  client = await server.open();
  expected = await client.send('forward', { model: MODEL }, inputs);
  expect(expected.ok).toBe(true);
  await client.close();
});
afterAll(() => {
  silent.terminate();
  return server.stop();
});
beforeEach(async () => {
  client = await server.open();
});
/** After whatever a test did, a good request on the same connection gives what it gave before. */
afterEach(async () => {
  if (client.socket.readyState !== WebSocket.OPEN) client = await server.open();
  const answer = await client.send('forward', { model: MODEL }, inputs);
  expect(errorOf(answer.tensors?.get('out'), expected.tensors!.get('out')!)).toBeLessThan(1e-6);
  expect(await client.finish()).toEqual([]);
});

async function expectComplaint(
  bytes: string | Uint8Array,
  codes: string | RegExp,
  id?: string,
): Promise<void> {
  const note =
    typeof bytes === 'string' ? bytes.slice(0, 80) : Buffer.from(bytes.subarray(0, 80)).toString('latin1');
  const { ok, error } = await client.complain(bytes);
  expect(ok, note).toBe(false);
  expect(error!.code, note).toMatch(codes);
  expect(error!.message.length, note).toBeGreaterThan(10);
  expect(error!.details, note).toBeTypeOf('object');
  if (id !== undefined) expect(error!.details.id, note).toBe(id);
}

const request = (fields: object): string =>
  JSON.stringify({ id: 'q', op: 'forward', model: MODEL, ...fields });

test('text that is no JSON object is answered ERR_BAD_FRAME with id null', async () => {
  for (const text of [
    '',
    ' ',
    '{',
    '[]',
    'null',
    '3',
    '"stats"',
    'true',
    '{"id":"1","op":NaN}',
    '['.repeat(100_000),
  ]) {
    await expectComplaint(text, 'ERR_BAD_FRAME');
  }
});

test('a message without a usable id is answered with id null', async () => {
  for (const id of [undefined, 3, '', null, ['7'], {}, 'a'.repeat(257)]) {
    await expectComplaint(JSON.stringify({ id, op: 'stats' }), /^ERR_BAD_(REQUEST|FRAME)$/);
  }
  await expectComplaint(encode({ req: '{"op":"forward"}' }, inputs), /^ERR_BAD_(REQUEST|FRAME)$/);
});

test('an operation in the wrong kind of frame is answered with id null and the id in the details', async () => {
  for (const op of ['forward', 'model.put', 'lora.put']) {
    await expectComplaint(request({ id: 'wrong', op }), 'ERR_BAD_FRAME', 'wrong');
  }
  const text = ['models.list', 'model.load', 'model.unload', 'model.header', 'model.has', 'lora.has'];
  for (const op of [...text, 'loras.list', 'lora.load', 'cancel', 'stats']) {
    await expectComplaint(encode({ req: request({ id: 'wrong', op }) }, new Map()), 'ERR_BAD_FRAME', 'wrong');
  }
});

test('a binary frame without a request in its metadata is answered ERR_BAD_FRAME', async () => {
  await expectComplaint(encode({}, inputs), 'ERR_BAD_FRAME');
  await expectComplaint(encode({ res: request({}) }, inputs), 'ERR_BAD_FRAME');
  for (const req of ['', '{', '[]', 'null', '3'])
    await expectComplaint(encode({ req }, inputs), 'ERR_BAD_FRAME');
});

test('bytes that are no safetensors file are answered ERR_BAD_FRAME', async () => {
  for (const length of [0, 1, 7, 8, 9, 1000])
    await expectComplaint(Buffer.alloc(length, 0xa5), 'ERR_BAD_FRAME');
  await expectComplaint(Buffer.alloc(1000), 'ERR_BAD_FRAME');
});

test('a file cut anywhere, or with bytes behind its end, is answered ERR_BAD_FRAME', async () => {
  const good = encode({ req: request({}) }, inputs);
  for (const length of [1, 7, 8, 9, 60, 200, 400, good.length - 4, good.length - 1]) {
    await expectComplaint(good.subarray(0, length), 'ERR_BAD_FRAME');
  }
  await expectComplaint(Buffer.concat([good, Buffer.alloc(1)]), 'ERR_BAD_FRAME');
});

test('a lying length of the header is answered ERR_BAD_FRAME', async () => {
  for (const length of [0n, 1n, 2n, 50n, 10n ** 6n, 2n ** 32n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n]) {
    const bytes = encode({ req: request({}) }, inputs);
    bytes.writeBigUInt64LE(length);
    await expectComplaint(bytes, 'ERR_BAD_FRAME');
  }
});

test('a header that contradicts itself or the data is answered ERR_BAD_FRAME', async () => {
  const data = Buffer.alloc(8);
  const entry = (dtype: unknown, shape: unknown, ...data_offsets: unknown[]) => ({
    dtype,
    shape,
    data_offsets,
  });
  for (const tensors of [
    { x: entry('F32', [3], 0, 8) },
    { x: entry('F32', [2], 0, 4) },
    { x: entry('F32', [1], 0, 4) },
    { x: entry('F32', [4], 0, 16) },
    { x: entry('F32', [2], 8, 0) },
    { x: entry('F32', [-2], 0, 8) },
    { x: entry('F32', [-1, -2], 0, 8) },
    { x: entry('F32', [1.5], 0, 8) },
    { x: entry('F32', ['2'], 0, 8) },
    { x: entry('F32', 2, 0, 8) },
    { x: entry('F32', [2 ** 53, 2 ** 53], 0, 8) },
    { x: entry('F32', [2]) },
    { x: entry('F32', [2], 0, 8, 8) },
    { x: entry('Q4', [8], 0, 8) },
    { x: entry(4, [2], 0, 8) },
    { x: entry('f32', [2], 0, 8) },
    { x: { ...entry('F32', [2], 0, 8), scale: 1 } },
    { x: null },
    { x: entry('F32', [2], 0, 8), y: entry('F32', [1], 4, 8) },
    { x: entry('F32', [1], 0, 4), y: entry('F32', [0], 8, 8) },
    { x: entry('F32', [1], 4, 8) },
    { ['__proto__']: entry('F32', [2], 0, 8) },
  ]) {
    const header = JSON.stringify({ __metadata__: { req: request({}) }, ...tensors });
    await expectComplaint(frame(header, data), 'ERR_BAD_FRAME');
  }
  const twice = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}';
  await expectComplaint(frame(`{${twice},${twice.replace('0,4', '4,8')}}`, data), 'ERR_BAD_FRAME');
});

test('metadata that is no object of strings is answered ERR_BAD_FRAME', async () => {
  for (const header of [
    '[]',
    'null',
    '{"__metadata__":[]}',
    '{"__metadata__":{"req":{}}}',
    '{"__metadata__":"req"}',
    '{',
  ]) {
    await expectComplaint(frame(header), 'ERR_BAD_FRAME');
  }
  const bytes = encode({ req: request({}) }, inputs);
  bytes[30] = 0xff;
  await expectComplaint(bytes, 'ERR_BAD_FRAME');
});

test('tensors in any order, further metadata and an unpadded header are accepted', async () => {
  const at = (name: string, begin: number): string => {
    const { dtype, shape, data } = inputs.get(name)!;
    return `"${name}":${JSON.stringify({ dtype, shape, data_offsets: [begin, begin + data.length] })}`;
  };
  const [x, timesteps, context] = ['x', 'timesteps', 'context'].map((name) => inputs.get(name)!.data);
  const entries = [at('x', context!.length + 8), at('timesteps', context!.length), at('context', 0)];
  for (const padding of ['', ' ', '       ']) {
    const id = client.newId();
    const metadata = JSON.stringify({ format: 'pt', req: request({ id }) });
    const header = Buffer.from(`{${entries.join(',')},"__metadata__":${metadata}}${padding}`);
    const length = Buffer.alloc(8);
    length.writeUInt32LE(header.length);
    const answer = client.answerTo(id);
    client.socket.send(Buffer.concat([length, header, context!, timesteps!, x!]));
    expect(errorOf((await answer).tensors?.get('out'), expected.tensors!.get('out')!)).toBeLessThan(1e-6);
  }
});

test('a message in many WebSocket fragments is one frame', async () => {
  const id = client.newId();
  const bytes = encode({ req: request({ id }) }, inputs);
  const answer = client.answerTo(id);
  for (let at = 0; at < bytes.length; at += 1000) {
    client.socket.send(bytes.subarray(at, at + 1000), { fin: at + 1000 >= bytes.length });
  }
  expect((await answer).ok).toBe(true);
});

test('a frame a little over the limit is answered ERR_TOO_LARGE with id null', async () => {
  const { maxMessageBytes } = client.hello.limits!;
  await expectComplaint(Buffer.alloc(maxMessageBytes + 1), 'ERR_TOO_LARGE');
});

test('a frame far over the limit ends the connection with close code 1009', async () => {
  const { maxMessageBytes } = client.hello.limits!;
  const head = Buffer.from([0x82, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
  head.writeBigUInt64BE(BigInt(maxMessageBytes) + 65n * 2n ** 20n, 2);
  rawSocket(client).write(head);
  expect(await client.closed).toBe(1009);
});

test('bytes that violate the WebSocket protocol end that connection only', async () => {
  const other = await server.open();
  rawSocket(client).write(Buffer.from([0x81, 0x02, 0x7b, 0x7d]));
  expect(await client.closed).toBe(1002);
  client = await server.open();
  rawSocket(client).write(Buffer.from([0x81, 0x81, 0, 0, 0, 0, 0xff]));
  expect(await client.closed).toBe(1007);
  expect(await other.finish()).toEqual([]);
});

test('a client that reads nothing for a while gets every answer once', async () => {
  const zeros = new Map(
    Array.from({ length: 1000 }, (_, i) => [`t${i}`, f32([16_384], new Float32Array(16_384))]),
  );
  const digest = '0'.repeat(64);
  const put = await client.send('model.put', { digest }, zeros);
  const { actual } = put.error!.details as { actual: string };
  expect((await client.send('model.put', { digest: actual }, zeros)).ok).toBe(true);
  client.socket.pause();
  const values = [...zeros.keys()];
  const large = [1, 2, 3].map(() => client.ask('model.header', { model: `sha256:${actual}`, values }));
  const small = client.ask('loras.list');
  const other = await server.open();
  expect((await other.send('forward', { model: MODEL }, inputs)).ok).toBe(true);
  expect(await other.finish()).toEqual([]);
  client.socket.resume();
  for (const answer of await Promise.all(large)) expect(answer.tensors!.size).toBe(1000);
  expect((await small).ok).toBe(true);
});

test('a ping of the client is answered, and the server pings after 20 seconds', {
  timeout: 40_000,
}, async () => {
  const pong = new Promise((resolve) => client.socket.once('pong', (data) => resolve(data.toString())));
  client.socket.ping('hallo');
  expect(await pong).toBe('hallo');
  while (ping.at === undefined && Date.now() < ping.started + 30_000)
    await new Promise((wake) => setTimeout(wake, 100));
  expect(ping.at! - ping.started).toBeGreaterThan(5_000);
  expect(ping.at! - ping.started).toBeLessThan(25_000);
  expect(silent.readyState).toBe(WebSocket.OPEN);
});

/** The TCP connection under a WebSocket, for bytes that `ws` would never send. */
function rawSocket({ socket }: Client): NodeJS.WritableStream {
  return (socket as unknown as { readonly _socket: NodeJS.WritableStream })._socket;
}
