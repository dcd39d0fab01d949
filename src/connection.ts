/**
 * One WebSocket to a server, with requests matched to their answers, the server's window and size limit kept, and
 * cancellation. Knows the frames but no operation: `client.ts` gives them types. Does not reconnect.
 */
import WebSocket from 'ws';
import { isErrorCode, UnetdError } from './errors.ts';
import type { TensorView } from './safetensors.ts';
import type { Hello, Operation } from './server/protocol.ts';
import { SUBPROTOCOL } from './server/protocol.ts';
import { decodeFrame, encodeBinary, encodeText, type JsonObject, type Message } from './server/wire.ts';

export interface ConnectOptions {
  readonly token?: string;
  /** Milliseconds until the server must have said hello; 10,000 unless told. */
  readonly timeoutMs?: number;
}

export type ProgressListener = (progress: {
  readonly stage: string;
  readonly done: number;
  readonly total: number;
}) => void;

export interface RequestOptions {
  /** Makes the frame a binary one. */
  readonly tensors?: readonly TensorView[];
  readonly onProgress?: ProgressListener;
  readonly signal?: AbortSignal;
}

interface Pending {
  readonly resolve: (reply: Message) => void;
  readonly reject: (error: UnetdError) => void;
  readonly onProgress: ProgressListener | undefined;
}

export class Connection {
  readonly hello: Hello;
  readonly #socket: WebSocket;
  readonly #pending = new Map<string, Pending>();
  /** Requests that wait for a place in the server's window. */
  readonly #waiting = new Set<() => void>();
  #nextId = 1;
  /** Requests that hold a place in the window, sent or about to be. */
  #open = 0;
  #ended: UnetdError | null = null;

  private constructor(socket: WebSocket, hello: Hello) {
    this.#socket = socket;
    this.hello = hello;
    socket.on('message', (data: Buffer, isBinary) => this.#receive(isBinary ? data : data.toString('utf8')));
    socket.on('close', (code, reason) => this.#end(`The connection closed (${code} ${reason.toString()})`));
    socket.on('error', (error) => this.#end(`The connection failed: ${error.message}`));
  }

  /** Connects and waits for the server's hello. ERR_UNAUTHORIZED, ERR_DISCONNECTED. */
  static async open(url: string, options: ConnectOptions): Promise<Connection> {
    const timeoutMs = options.timeoutMs ?? 10_000;
    const socket = new WebSocket(url, SUBPROTOCOL, {
      headers: options.token === undefined ? {} : { authorization: `Bearer ${options.token}` },
      perMessageDeflate: false,
      maxPayload: 0,
      handshakeTimeout: timeoutMs,
    });
    let timer: NodeJS.Timeout | undefined;
    try {
      return await new Promise<Connection>((resolve, reject) => {
        timer = setTimeout(
          () => reject(disconnected(`${url} did not say hello within ${timeoutMs} ms.`)),
          timeoutMs,
        );
        socket.once('error', (error) => reject(disconnected(`Cannot connect to ${url}: ${error.message}`)));
        socket.once('close', () => reject(disconnected(`${url} closed the connection before saying hello.`)));
        socket.once('unexpected-response', (_request, response) => {
          const chunks: Buffer[] = [];
          response.on('data', (chunk: Buffer) => chunks.push(chunk));
          response.on('end', () => {
            const code = response.statusCode === 401 ? 'ERR_UNAUTHORIZED' : 'ERR_DISCONNECTED';
            const reason = Buffer.concat(chunks).toString('utf8').slice(0, 1000).trim();
            reject(
              new UnetdError(code, `${url} refused the connection with ${response.statusCode}: ${reason}`),
            );
          });
        });
        // The connection listens from within this call on: nothing that follows the hello is lost.
        socket.once('message', (data: Buffer) => resolve(Connection.#greeted(socket, url, data)));
      });
    } catch (error) {
      socket.on('error', () => {});
      socket.terminate();
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  static #greeted(socket: WebSocket, url: string, data: Buffer): Connection | Promise<never> {
    try {
      const { header } = decodeFrame(data.toString('utf8'), 'res');
      if (header.event !== 'hello') throw new Error('its first message is no hello');
      return new Connection(socket, header as unknown as Hello);
    } catch (error) {
      return Promise.reject(disconnected(`${url} is no unetd server: ${UnetdError.from(error).message}`));
    }
  }

  /** Sends a request and waits for its one answer; rejects with the server's error, ERR_TOO_LARGE or ERR_DISCONNECTED. */
  async request(op: Operation, fields: JsonObject, options: RequestOptions = {}): Promise<Message> {
    const { signal, tensors } = options;
    // A cancel must not wait behind what it cancels: one place of the window is left to it.
    if (op === 'cancel') this.#open += 1;
    else await this.#place(signal);
    let id: string | undefined;
    const onAbort = (): void => {
      if (id !== undefined) this.request('cancel', { target: id }).catch(() => {});
    };
    try {
      if (this.#ended !== null) throw this.#ended;
      if (signal?.aborted)
        throw new UnetdError('ERR_CANCELLED', 'The request was cancelled before it was sent.');
      id = String(this.#nextId++);
      const header = { id, op, ...fields };
      const frame = tensors === undefined ? encodeText(header) : encodeBinary(header, tensors, 'req');
      this.#checkSize(frame, op);
      signal?.addEventListener('abort', onAbort, { once: true });
      return await this.#exchange(id, frame, options.onProgress);
    } finally {
      signal?.removeEventListener('abort', onAbort);
      this.#open -= 1;
      this.#wake();
    }
  }

  /** Closes the connection; open requests reject with ERR_DISCONNECTED. */
  close(): Promise<void> {
    return new Promise((resolve) => {
      if (this.#socket.readyState === WebSocket.CLOSED) return resolve();
      this.#socket.once('close', () => resolve());
      this.#socket.close(1000);
    });
  }

  #exchange(
    id: string,
    frame: string | Uint8Array,
    onProgress: ProgressListener | undefined,
  ): Promise<Message> {
    const answer = new Promise<Message>((resolve, reject) => {
      this.#pending.set(id, { resolve, reject, onProgress });
      this.#socket.send(frame);
    });
    return answer.finally(() => this.#pending.delete(id));
  }

  /** Takes a place in the server's window, as soon as it has room. */
  async #place(signal: AbortSignal | undefined): Promise<void> {
    const window = Math.max(1, this.hello.limits.maxInFlight - 1);
    while (this.#open >= window && this.#ended === null && !signal?.aborted) {
      let wake = (): void => {};
      await new Promise<void>((resolve) => {
        wake = resolve;
        this.#waiting.add(wake);
        signal?.addEventListener('abort', wake, { once: true });
      });
      this.#waiting.delete(wake);
      signal?.removeEventListener('abort', wake);
    }
    // Without a pause after the check, or two callers would take the same place.
    this.#open += 1;
  }

  #wake(): void {
    for (const wake of this.#waiting) {
      this.#waiting.delete(wake);
      wake();
      return;
    }
  }

  #checkSize(frame: string | Uint8Array, op: Operation): void {
    const bytes = typeof frame === 'string' ? Buffer.byteLength(frame) : frame.byteLength;
    const limit = this.hello.limits.maxMessageBytes;
    if (bytes <= limit) return;
    throw new UnetdError(
      'ERR_TOO_LARGE',
      `The ${op} request takes ${bytes} bytes, the server accepts ${limit}.`,
    );
  }

  #receive(frame: string | Uint8Array): void {
    let message: Message;
    try {
      message = decodeFrame(frame, 'res');
    } catch (error) {
      this.#end(`The server sent an unreadable frame: ${UnetdError.from(error).message}`);
      this.#socket.terminate();
      return;
    }
    const { header } = message;
    const pending = typeof header.id === 'string' ? this.#pending.get(header.id) : undefined;
    if (header.event === 'progress') {
      const { stage, done, total } = header;
      pending?.onProgress?.({ stage: String(stage), done: Number(done), total: Number(total) });
    } else if (header.ok === true) pending?.resolve(message);
    else if (header.ok === false) {
      const error = errorFrom(header.error);
      const meant = this.#pending.get(String(header.id ?? error.details.id));
      if (meant !== undefined) meant.reject(error);
      // Nobody can tell which request was meant: none can be trusted to be answered.
      else if (header.id === null) for (const each of this.#pending.values()) each.reject(error);
    }
  }

  #end(reason: string): void {
    this.#ended ??= disconnected(`${reason.trim()}; connect again and resend.`);
    for (const each of this.#pending.values()) each.reject(this.#ended);
    for (const wake of this.#waiting) wake();
  }
}

function disconnected(message: string): UnetdError {
  return new UnetdError('ERR_DISCONNECTED', message);
}

function errorFrom(value: unknown): UnetdError {
  const { code, message, details } = (value ?? {}) as Readonly<Record<string, unknown>>;
  const known = typeof code === 'string' && isErrorCode(code) ? code : 'ERR_INTERNAL';
  const facts = typeof details === 'object' && details !== null ? (details as JsonObject) : {};
  return new UnetdError(known, typeof message === 'string' ? message : 'The server gave no reason.', facts);
}
