/**
 * A client of several servers that do the same work, or of one behind a balancer: uses one connection, and when that ends
 * connects to the next address and sends what was open again. A forward is pure, so it may run twice.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { Client, type ConnectOptions, type ForwardRequest, type ForwardResult } from './client.ts';
import { UnetdError } from './errors.ts';

export interface FailoverOptions extends ConnectOptions {
  /** How long a request waits for any server at all, or any whose engine runs; 60,000 ms unless told. */
  readonly patienceMs?: number;
  /** How often a request is sent before its failure counts as its own; 5 unless told. */
  readonly attempts?: number;
  /** Runs on every new connection before anything else does: the place to upload LoRAs that servers do not have. */
  readonly prepare?: (client: Client) => Promise<void>;
}

const PATIENCE_MS = 60_000;
const FIRST_PAUSE_MS = 50;
const MAX_PAUSE_MS = 2000;

export class FailoverClient {
  readonly #urls: readonly string[];
  readonly #options: FailoverOptions;
  /** The connection in use, or about to be. */
  #current: Promise<Client> | null = null;
  #next = 0;
  #closed = false;
  #resent = 0;

  /** Addresses `ws://HOST:PORT/v1`, tried in order. Connects with the first request. */
  constructor(urls: readonly string[], options: FailoverOptions = {}) {
    if (urls.length === 0) throw new UnetdError('ERR_BAD_REQUEST', 'A client needs one address or more.');
    this.#urls = urls;
    this.#options = options;
  }

  /** Requests sent again so far. */
  get resent(): number {
    return this.#resent;
  }

  /** As `Client.forward`, but for `reuse`, which belongs to one connection: ERR_BAD_REQUEST. */
  forward(request: ForwardRequest, options: { readonly signal?: AbortSignal } = {}): Promise<ForwardResult> {
    if (request.reuse === undefined)
      return this.run((client) => client.forward(request, options), options.signal);
    const message = 'Kept tensors belong to one connection: send them with every request, or use a Client.';
    return Promise.reject(new UnetdError('ERR_BAD_REQUEST', message));
  }

  /** Does something on a connection, and again on another where that ends before the answer, or its server cannot compute now. */
  async run<Value>(work: (client: Client) => Promise<Value>, signal?: AbortSignal): Promise<Value> {
    const { attempts = 5, patienceMs = PATIENCE_MS } = this.#options;
    const deadline = performance.now() + patienceMs;
    const met = { end: 0, outage: 0 };
    for (;;) {
      if (this.#closed) throw new UnetdError('ERR_DISCONNECTED', 'This client was closed.');
      const connection = this.#connection();
      const client = await connection;
      try {
        return await work(client);
      } catch (error) {
        const { fault, retryAfterMs } = diagnose(error);
        if (signal?.aborted || fault === 'request') throw error;
        if (fault === 'busy') {
          await pause(retryAfterMs, signal);
          continue;
        }
        met[fault] += 1;
        if (met.end >= attempts || (fault === 'outage' && performance.now() > deadline)) throw error;
        this.#resent += 1;
        this.#leave(connection);
        if (fault === 'end') continue;
        // What else is open there meets the same answer, or is sent again too.
        void client.close();
        if (met.outage % this.#urls.length === 0) await pause(Math.min(retryAfterMs, MAX_PAUSE_MS), signal);
      }
    }
  }

  /** Open requests reject with ERR_DISCONNECTED. */
  async close(): Promise<void> {
    this.#closed = true;
    const client = await this.#current?.catch(() => undefined);
    await client?.close();
  }

  #connection(): Promise<Client> {
    if (this.#current === null) {
      const connecting = this.#connect();
      this.#current = connecting;
      connecting.catch(() => this.#leave(connecting));
    }
    return this.#current;
  }

  /** The next request goes elsewhere. Others may still be answered there, and a server that shuts down closes the connection. */
  #leave(connection: Promise<Client>): void {
    if (this.#current === connection) this.#current = null;
  }

  /** The first address that answers, in turns until there is no patience left. */
  async #connect(): Promise<Client> {
    const { patienceMs = PATIENCE_MS, prepare } = this.#options;
    const deadline = performance.now() + patienceMs;
    for (let round = 0; ; round += 1) {
      let failure: unknown;
      for (const _ of this.#urls) {
        const url = this.#urls[this.#next]!;
        this.#next = (this.#next + 1) % this.#urls.length;
        let client: Client | undefined;
        try {
          client = await Client.connect(url, this.#options);
          await prepare?.(client);
          return client;
        } catch (error) {
          void client?.close();
          failure = error;
          if (!['end', 'outage'].includes(diagnose(error).fault)) throw error;
        }
      }
      if (this.#closed || performance.now() > deadline) throw failure;
      await pause(Math.min(MAX_PAUSE_MS, FIRST_PAUSE_MS * 2 ** round));
    }
  }
}

type Fault = 'request' | 'busy' | 'end' | 'outage';

/** What an error says: the request is at fault, the server has too much to do, is at its end, or has no engine now. */
function diagnose(error: unknown): { readonly fault: Fault; readonly retryAfterMs: number } {
  const { code, details } = UnetdError.from(error);
  const { retryAfterMs } = details;
  let fault: Fault = 'request';
  if (code === 'ERR_BUSY') fault = 'busy';
  else if (code === 'ERR_DISCONNECTED' || code === 'ERR_SHUTTING_DOWN') fault = 'end';
  // Without a hint it is this request that ended engines: it would end another one elsewhere.
  else if (code === 'ERR_ENGINE_DOWN' && retryAfterMs !== undefined) fault = 'outage';
  return { fault, retryAfterMs: Number(retryAfterMs ?? FIRST_PAUSE_MS) };
}

/** Up to half as long again, so that many clients do not come back at once; over at once where `signal` aborts. */
async function pause(ms: number, signal?: AbortSignal): Promise<void> {
  await sleep(ms * (1 + Math.random() / 2), undefined, { signal }).catch(() => {});
}
