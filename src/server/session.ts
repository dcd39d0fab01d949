/**
 * One connection: its open requests, its kept tensors and its window. Turns frames into operations and their outcomes into
 * frames, each request answered exactly once. Sends through a function and so knows no sockets.
 */
import { type ErrorCode, UnetdError } from '../errors.ts';
import type { TensorView } from '../safetensors.ts';
import { describe } from './fields.ts';
import { checkFrameSize } from './frame-size.ts';
import { type KeptSpace, KeptTensors } from './kept.ts';
import { HANDLERS, type Reply, type Services } from './operations.ts';
import { OPERATIONS, type Operation, type WireError } from './protocol.ts';
import { decodeFrame, encodeBinary, encodeText, idOf, type JsonObject, type Message } from './wire.ts';

export interface SessionLimits {
  readonly maxMessageBytes: number;
  /** Most open requests. */
  readonly maxInFlight: number;
  readonly maxKeptBytes: number;
}

/** Progress events closer together than this are left out, but for the last of a stage. */
const PROGRESS_MS = 50;
const MAX_ID = 256;
/** Errors that no client causes: worth a line in the log at any level. */
const DEFECTS: ReadonlySet<ErrorCode> = new Set(['ERR_INTERNAL', 'ERR_GPU', 'ERR_ENGINE_DOWN']);
const NO_TENSORS: ReadonlyMap<string, TensorView> = new Map();

/** Sends a frame, and says when it has left or never will. */
type Send = (frame: string | Uint8Array, left?: () => void) => void;

export class Session {
  readonly owner: string;
  readonly kept: KeptTensors;
  readonly #services: Services;
  readonly #limits: SessionLimits;
  readonly #send: Send;
  /** Id -> how to cancel the request. */
  readonly #open = new Map<string, AbortController>();
  #closed = false;
  #whenIdle: (() => void)[] = [];

  constructor(owner: string, services: Services, limits: SessionLimits, keptSpace: KeptSpace, send: Send) {
    this.owner = owner;
    this.kept = new KeptTensors(limits.maxKeptBytes, keptSpace);
    this.#services = services;
    this.#limits = limits;
    this.#send = send;
  }

  get open(): number {
    return this.#open.size;
  }

  /**
   * Takes one frame, a string for a text frame. Never throws: what is wrong with it is answered. `done` is called when the answer
   * has left or never will: then nothing of the frame is needed any more.
   */
  receive(frame: string | Uint8Array, done: () => void = () => {}): void {
    let message: Message;
    let id: string | null = null;
    let op: Operation;
    try {
      checkFrameSize(frame, this.#limits.maxMessageBytes);
      message = decodeFrame(frame, 'req');
      id = this.#freshId(message.header);
      op = operationOf(message, id);
      this.#admit(op);
    } catch (error) {
      const fault = UnetdError.from(error);
      // A frame of the wrong kind is no request, whatever id it carries.
      this.#fail(fault.code === 'ERR_BAD_FRAME' ? null : id, fault, 'unknown', done);
      return;
    }
    this.#services.log.debug({ owner: this.owner, id, op, ...subjectOf(message) }, 'request');
    void this.#serve(id, op, message, done);
  }

  /** Cancels all open requests; nothing is sent any more. */
  close(): void {
    this.#closed = true;
    for (const controller of this.#open.values()) controller.abort(cancelled('its connection ended'));
    this.kept.clear();
    this.#services.residents.dropOwner(this.owner);
    // A part file that cannot be removed now goes with the folder in the end.
    this.#services.library.uploads.dropOwner(this.owner).catch(() => {});
  }

  /** Resolves when no request is open. */
  idle(): Promise<void> {
    if (this.#open.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#whenIdle.push(resolve));
  }

  #freshId(header: JsonObject): string {
    const id = idOf(header);
    if (id === null || id === '' || id.length > MAX_ID) {
      throw new UnetdError(
        'ERR_BAD_REQUEST',
        `"id" must be a string of 1 to ${MAX_ID} characters, got ${describe(header.id)}.`,
      );
    }
    if (!this.#open.has(id)) return id;
    // Addressed to nobody: under the id it would be taken for the answer to the other request.
    throw new UnetdError(
      'ERR_DUPLICATE_ID',
      `A request with the id "${id}" is open on this connection; use another id.`,
      { id },
    );
  }

  #admit(op: Operation): void {
    if (op === 'cancel') return;
    if (op !== 'stats' && this.#services.isDraining()) {
      throw new UnetdError(
        'ERR_SHUTTING_DOWN',
        'The server is shutting down and takes no new requests; connect to another, or later.',
      );
    }
    const { maxInFlight } = this.#limits;
    if (this.#open.size < maxInFlight) return;
    throw new UnetdError(
      'ERR_BUSY',
      `This connection has ${this.#open.size} open requests, its limit; wait for an answer before sending more.`,
      { open: this.#open.size, limit: maxInFlight },
    );
  }

  async #serve(id: string, op: Operation, { header, tensors }: Message, done: () => void): Promise<void> {
    const controller = new AbortController();
    this.#open.set(id, controller);
    const { signal } = controller;
    let outcome: Reply | UnetdError;
    try {
      const reply = HANDLERS[op](this.#services, {
        owner: this.owner,
        header,
        tensors: tensors ?? NO_TENSORS,
        kept: this.kept,
        signal,
        progress: this.#progressOf(id),
        cancel: (target) => this.#cancel(target, id),
      });
      outcome = await untilAborted(Promise.resolve(reply), signal);
    } catch (error) {
      outcome = UnetdError.from(error);
    }
    this.#open.delete(id);
    if (outcome instanceof UnetdError) this.#fail(id, outcome, op, done);
    else this.#answer(id, outcome, op, done);
    if (this.#open.size === 0) for (const resolve of this.#whenIdle.splice(0)) resolve();
  }

  #cancel(target: string, from: string): boolean {
    const controller = target === from ? undefined : this.#open.get(target);
    controller?.abort(cancelled('its client asked for that'));
    return controller !== undefined;
  }

  #progressOf(id: string): (stage: string, done: number, total: number) => void {
    let last = Number.NEGATIVE_INFINITY;
    return (stage, done, total) => {
      const now = performance.now();
      if (this.#closed || !this.#open.has(id) || (now - last < PROGRESS_MS && done < total)) return;
      last = now;
      this.#send(encodeText({ id, event: 'progress', stage, done, total }));
    };
  }

  #answer(id: string, reply: Reply, op: Operation, done: () => void): void {
    let frame: string | Uint8Array;
    try {
      frame =
        'result' in reply
          ? encodeText({ id, ok: true, result: reply.result })
          : encodeBinary({ id, ok: true, ...reply.fields }, reply.tensors, 'res');
    } catch (error) {
      this.#fail(id, UnetdError.from(error), op, done);
      return;
    }
    this.#services.metrics.answered(op, 'ok');
    const timing = 'fields' in reply ? reply.fields.timing : undefined;
    this.#services.log.debug({ owner: this.owner, id, op, ...(timing as object | undefined) }, 'answered');
    this.#finish(frame, done);
  }

  #fail(
    id: string | null,
    { code, message, details }: UnetdError,
    op: Operation | 'unknown',
    done: () => void,
  ): void {
    this.#services.metrics.answered(op, code);
    const level = DEFECTS.has(code) ? 'error' : 'debug';
    this.#services.log[level]({ owner: this.owner, id, op, code }, message);
    const error: WireError = { code, message, details };
    this.#finish(encodeText({ id, ok: false, error }), done);
  }

  #finish(frame: string | Uint8Array, done: () => void): void {
    if (this.#closed) done();
    else this.#send(frame, done);
  }
}

/** The operation, if there is one of that name and it came in the right kind of frame. */
function operationOf({ header, tensors }: Message, id: string): Operation {
  const { op } = header;
  if (typeof op !== 'string') {
    throw new UnetdError('ERR_BAD_REQUEST', `"op" must name an operation, got ${describe(op)}.`);
  }
  if (!Object.hasOwn(OPERATIONS, op)) {
    const known = Object.keys(OPERATIONS).join(', ');
    throw new UnetdError(
      'ERR_UNKNOWN_OP',
      `There is no operation "${op.slice(0, 100)}"; this server has ${known}.`,
    );
  }
  const kind = tensors === null ? 'text' : 'binary';
  const wanted = OPERATIONS[op as Operation];
  if (kind === wanted) return op as Operation;
  throw new UnetdError(
    'ERR_BAD_FRAME',
    `"${op}" belongs in a ${wanted} frame, request "${id}" came in a ${kind} frame.`,
    { id },
  );
}

/** What a line of the log says about a request. */
function subjectOf({ header, tensors }: Message): object {
  const { model, loras } = header;
  const images = tensors?.get('x')?.shape[0];
  return {
    ...(typeof model === 'string' ? { model: model.slice(0, 200) } : {}),
    ...(Array.isArray(loras) ? { loras: loras.length } : {}),
    ...(images === undefined ? {} : { images }),
  };
}

function cancelled(why: string): UnetdError {
  return new UnetdError('ERR_CANCELLED', `The request was cancelled: ${why}.`);
}

/** The promise, or the abort reason as soon as the signal aborts; the work itself may still go on. */
function untilAborted<Value>(promise: Promise<Value>, signal: AbortSignal): Promise<Value> {
  return new Promise((resolve, reject) => {
    signal.addEventListener('abort', () => reject(signal.reason), { once: true });
    promise.then(resolve, reject);
  });
}
