/**
 * A WebSocket client written from docs/PROTOCOL.md alone: one connection, its requests and everything it is sent.
 * It is not `src/client.ts` and hides nothing: tests may send any bytes, and every message of the server is kept.
 */
import { readFileSync } from 'node:fs';
import { type RawData, WebSocket } from 'ws';
import { decode, encode, type Tensors } from './tensors.ts';

/** Longer than any answer of the tests takes on a busy machine. */
const PATIENCE_MS = 40_000;

/** The codes of docs/ERRORS.md: the server may send no other. */
const CODES: ReadonlySet<string> = new Set(
  readFileSync(new URL('../../docs/ERRORS.md', import.meta.url), 'utf8').match(/(?<=^\| `)ERR_\w+/gm),
);

export interface ErrorBody {
  readonly code: string;
  readonly message: string;
  readonly details: Readonly<Record<string, unknown>>;
}

/** One message of the server; `tensors` where it came in a binary frame. */
export interface Message {
  readonly id?: string | null;
  readonly ok?: boolean;
  readonly event?: string;
  // biome-ignore lint/suspicious/noExplicitAny: a test reads whatever the server sent, and fails where it is not there
  readonly result?: any;
  readonly error?: ErrorBody;
  readonly timing?: { queueMs: number; gpuMs: number; batch: number; batchedRequests: number };
  readonly limits?: { readonly maxMessageBytes: number; readonly maxInFlight: number };
  readonly header?: {
    tensors: Record<string, { dtype: string; shape: number[] }>;
    metadata: Record<string, string>;
  };
  readonly tensors?: Tensors;
  readonly [field: string]: unknown;
}

/** The server answered the upgrade with plain HTTP. */
export class Refused extends Error {
  readonly status: number;
  readonly body: string;

  constructor(status: number, body: string) {
    super(`upgrade refused with ${status}: ${body}`);
    this.status = status;
    this.body = body;
  }
}

export interface OpenOptions {
  readonly protocols?: readonly string[];
  readonly headers?: Readonly<Record<string, string>>;
  readonly path?: string;
}

export type Fields = Readonly<Record<string, unknown>>;

export class Client {
  readonly socket: WebSocket;
  /** All messages in the order of their arrival, the hello first. */
  readonly messages: Message[] = [];
  /** Ids of the requests sent, each of which must be answered exactly once. */
  readonly sent: Set<string> = new Set();
  readonly closed: Promise<number>;
  #next = 0;
  #waiting: { readonly test: (message: Message) => boolean; readonly found: (message: Message) => void }[] =
    [];

  private constructor(socket: WebSocket) {
    this.socket = socket;
    this.closed = new Promise((resolve) => socket.on('close', resolve));
    socket.on('message', (data, isBinary) => this.#receive(data, isBinary));
    socket.on('error', () => {});
  }

  /** Resolves when the hello has come. */
  static async open(url: string, options: OpenOptions = {}): Promise<Client> {
    const socket = new WebSocket(
      options.path === undefined ? url : new URL(options.path, url),
      options.protocols ? [...options.protocols] : ['unetd.v1'],
      { headers: { ...options.headers }, maxPayload: 2 ** 30 },
    );
    const client = new Client(socket);
    const refused = new Promise<never>((_, reject) => {
      socket.on('error', reject);
      socket.on('unexpected-response', (_request, response) => {
        response.setEncoding('utf8');
        let body = '';
        response.on('data', (text: string) => {
          body += text;
        });
        response.on('end', () => reject(new Refused(response.statusCode ?? 0, body)));
      });
    });
    await Promise.race([client.until((message) => message.event === 'hello'), refused]);
    return client;
  }

  get hello(): Message {
    return this.messages[0]!;
  }

  newId(): string {
    this.#next += 1;
    return `r${this.#next}`;
  }

  /** Sends a text frame of a request. */
  ask(op: string, fields: Fields = {}): Promise<Message> {
    const id = this.newId();
    const answer = this.answerTo(id);
    this.socket.send(JSON.stringify({ id, op, ...fields }));
    return answer;
  }

  /** Sends a binary frame of a request. */
  send(op: string, fields: Fields, tensors: Tensors): Promise<Message> {
    const id = this.newId();
    const answer = this.answerTo(id);
    this.socket.send(encode({ req: JSON.stringify({ id, op, ...fields }) }, tensors));
    return answer;
  }

  /** The answer to a request that is about to be sent under this id. */
  answerTo(id: string): Promise<Message> {
    this.sent.add(id);
    const from = this.messages.length;
    return this.until((message) => message.id === id && message.ok !== undefined, from);
  }

  /** Sends any bytes or text, and gives the first message with id null from then on. */
  complain(frame: string | Uint8Array): Promise<Message> {
    const answer = this.until((message) => message.id === null, this.messages.length);
    this.socket.send(frame);
    return answer;
  }

  progressOf(id: string): readonly Message[] {
    return this.messages.filter((message) => message.id === id && message.event === 'progress');
  }

  /** The first message, from position `from` on, that passes the test; rejects when there is none or the connection closes. */
  until(test: (message: Message) => boolean, from = 0): Promise<Message> {
    const past = this.messages.slice(from).find(test);
    if (past) return Promise.resolve(past);
    return new Promise((resolve, reject) => {
      const lost = setTimeout(() => {
        const last = JSON.stringify(this.messages.at(-1)).slice(0, 300);
        reject(new Error(`no answer in ${PATIENCE_MS} ms; the last message was ${last}`));
      }, PATIENCE_MS);
      const found = (message: Message): void => {
        clearTimeout(lost);
        resolve(message);
      };
      this.#waiting.push({ test, found });
      void this.closed.then((code) => reject(new Error(`closed with ${code} before an answer`)));
    });
  }

  /** Closes, and lists what is wrong with the answers: requests not answered once, answers nobody asked for, unlisted codes. */
  async finish(): Promise<string[]> {
    // An answer sent twice would come before the answer to a later request.
    const last = await this.ask('models.list');
    const wrong = last.ok ? [] : ['the last models.list failed'];
    const counts = new Map<string, number>();
    for (const { id, ok } of this.messages) {
      if (typeof id === 'string' && ok !== undefined) counts.set(id, (counts.get(id) ?? 0) + 1);
    }
    for (const { error } of this.messages)
      if (error && !CODES.has(error.code)) wrong.push(`unlisted ${error.code}`);
    for (const id of this.sent) if (counts.get(id) !== 1) wrong.push(`${id}: ${counts.get(id) ?? 0} answers`);
    for (const id of counts.keys()) if (!this.sent.has(id)) wrong.push(`${id}: answered, never sent`);
    await this.close();
    return wrong;
  }

  close(): Promise<number> {
    this.socket.close(1000);
    return this.closed;
  }

  #receive(data: RawData, isBinary: boolean): void {
    const bytes = data as Buffer;
    let message: Message;
    if (isBinary) {
      const file = decode(bytes);
      message = { ...(JSON.parse(file.metadata.res!) as Message), tensors: file.tensors };
    } else message = JSON.parse(bytes.toString('utf8')) as Message;
    this.messages.push(message);
    const found = this.#waiting.filter(({ test }) => test(message));
    this.#waiting = this.#waiting.filter((entry) => !found.includes(entry));
    for (const entry of found) entry.found(message);
  }
}
