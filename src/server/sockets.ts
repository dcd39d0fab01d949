/**
 * The WebSocket side of the port: hello, pings, and when a connection is not read from: while its replies pile up,
 * or memory for its requests lacks. Hands every frame to a `Session` and knows nothing of what is in it.
 */
import type { IncomingMessage } from 'node:http';
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { type WebSocket, WebSocketServer } from 'ws';
import { Arrivals } from './arrivals.ts';
import type { GuardOptions } from './guard.ts';
import { Intake } from './intake.ts';
import type { KeptSpace } from './kept.ts';
import type { Logger } from './log.ts';
import type { Services } from './operations.ts';
import { type ConnectionStats, type Hello, type ServerStats, SUBPROTOCOL } from './protocol.ts';
import { Session, type SessionLimits } from './session.ts';
import { answerRefusal, refuseUpgrade } from './upgrade.ts';
import { encodeText } from './wire.ts';

export interface SocketOptions {
  readonly services: Services;
  readonly guard: GuardOptions;
  readonly limits: SessionLimits;
  readonly hello: () => Hello;
  readonly maxConnections: number;
  readonly pingMs: number;
  /** Unsent replies above which no more requests are read from a connection; they are again below an eighth of it. */
  readonly highWaterBytes: number;
  /** Memory for the requests of all connections, and as much again for what they keep. Has room for two of the largest frames at least. */
  readonly memoryBytes: number;
  readonly log: Logger;
}

interface Peer {
  readonly socket: WebSocket;
  readonly stream: Socket;
  readonly session: Session;
  readonly arrivals: Arrivals;
  readonly since: number;
  missedPings: number;
  bytesRead: number;
  /** Whether too many of its replies are unsent. */
  isBehind: boolean;
}

/** A frame up to this much over the limit is answered with ERR_TOO_LARGE; beyond it the connection is closed (1009). */
const OVERSIZE_BYTES = 64 * 1024 * 1024;
const MAX_MISSED_PINGS = 2;
/** How long a frame may hold memory that others wait for before it has arrived. */
const ARRIVAL_MS = 30_000;
/** Share of the memory that one connection may take, if that is more than its largest frame. */
const OWNER_SHARE = 0.25;

export class Sockets {
  readonly #options: SocketOptions;
  readonly #server: WebSocketServer;
  readonly #peers = new Set<Peer>();
  readonly #pinger: NodeJS.Timeout;
  readonly #intake: Intake;
  readonly #keptSpace: KeptSpace;
  #nextOwner = 1;
  #refused = 0;
  /** Bytes of connections that have ended. */
  readonly #past = { receivedBytes: 0, sentBytes: 0 };

  constructor(options: SocketOptions) {
    this.#options = options;
    const maxPayload = options.limits.maxMessageBytes + OVERSIZE_BYTES;
    const memoryBytes = Math.max(options.memoryBytes, 2 * maxPayload);
    this.#intake = new Intake(memoryBytes, Math.max(maxPayload, memoryBytes * OWNER_SHARE));
    this.#keptSpace = { limitBytes: memoryBytes, usedBytes: 0 };
    this.#server = new WebSocketServer({
      noServer: true,
      perMessageDeflate: false,
      maxPayload,
      handleProtocols: () => SUBPROTOCOL,
      clientTracking: false,
    });
    this.#pinger = setInterval(() => this.#ping(), options.pingMs);
    this.#pinger.unref();
  }

  get peers(): readonly Omit<ConnectionStats, 'forwards' | 'images'>[] {
    return [...this.#peers].map(({ session, stream, since }) => ({
      owner: session.owner,
      from: stream.remoteAddress ?? '',
      ageMs: performance.now() - since,
      openRequests: session.open,
      ...bytesOf(stream),
    }));
  }

  get traffic(): ServerStats['traffic'] {
    const all = [this.#past, ...[...this.#peers].map(({ stream }) => bytesOf(stream))];
    return {
      receivedBytes: all.reduce((sum, { receivedBytes }) => sum + receivedBytes, 0),
      sentBytes: all.reduce((sum, { sentBytes }) => sum + sentBytes, 0),
      accepted: this.#nextOwner - 1,
      refused: this.#refused,
    };
  }

  get incoming(): ServerStats['incoming'] {
    const { usedBytes: bytes, limitBytes } = this.#intake;
    return { bytes, limitBytes };
  }

  get kept(): { readonly tensors: number; readonly bytes: number } {
    const stores = [...this.#peers].map(({ session }) => session.kept);
    return {
      tensors: stores.reduce((sum, store) => sum + store.size, 0),
      bytes: stores.reduce((sum, store) => sum + store.bytes, 0),
    };
  }

  /** The `upgrade` event of the HTTP server. */
  upgrade(request: IncomingMessage, stream: Duplex, head: Buffer): void {
    const { guard, services, maxConnections, log } = this.#options;
    const isDraining = services.isDraining();
    const connections = this.#peers.size;
    const refusal = refuseUpgrade(request, { guard, isDraining, connections, maxConnections });
    if (refusal !== null) {
      this.#refused += 1;
      log.warn({ status: refusal.status, from: request.socket.remoteAddress }, refusal.reason);
      answerRefusal(stream, refusal);
      return;
    }
    this.#server.handleUpgrade(request, stream, head, (socket) => this.#welcome(socket, request.socket));
  }

  /** Resolves when no request of any connection is open. */
  async idle(): Promise<void> {
    while ([...this.#peers].some(({ session }) => session.open > 0)) {
      await Promise.all([...this.#peers].map(({ session }) => session.idle()));
    }
  }

  /** Closes all connections; what is already sent still goes out, for at most `graceMs`. */
  async close(graceMs: number): Promise<void> {
    clearInterval(this.#pinger);
    const closed = [...this.#peers].map(
      ({ socket }) =>
        new Promise<void>((resolve) => {
          const timer = setTimeout(() => socket.terminate(), graceMs);
          socket.once('close', () => {
            clearTimeout(timer);
            resolve();
          });
          socket.resume();
          socket.close(1001, 'the server shuts down');
        }),
    );
    await Promise.all(closed);
  }

  #welcome(socket: WebSocket, stream: Socket): void {
    const { services, limits, log } = this.#options;
    const owner = `connection ${this.#nextOwner++}`;
    const send = (frame: string | Uint8Array, left?: () => void): void => this.#send(peer, frame, left);
    const session = new Session(owner, services, limits, this.#keptSpace, send);
    const arrivals = new Arrivals(owner, this.#intake, () => this.#flow(peer));
    const since = performance.now();
    const peer: Peer = {
      socket,
      stream,
      session,
      arrivals,
      since,
      missedPings: 0,
      bytesRead: 0,
      isBehind: false,
    };
    this.#peers.add(peer);
    services.metrics.connected(owner);
    stream.setNoDelay(true);
    log.info({ owner, from: stream.remoteAddress }, 'connected');
    // Before `ws` sees the bytes: what a frame takes is known before it is there.
    stream.prependListener('data', (chunk: Buffer) => {
      arrivals.read(chunk, performance.now());
      if (arrivals.mustWait) this.#flow(peer);
    });
    socket.on('message', (data: Buffer, isBinary) =>
      session.receive(isBinary ? data : data.toString('utf8'), arrivals.take()),
    );
    socket.on('pong', () => {
      peer.missedPings = 0;
    });
    socket.on('error', (error) => log.warn({ owner, error: error.message }, 'connection failed'));
    socket.on('close', (code) => {
      this.#peers.delete(peer);
      session.close();
      arrivals.close();
      const bytes = bytesOf(stream);
      this.#past.receivedBytes += bytes.receivedBytes;
      this.#past.sentBytes += bytes.sentBytes;
      log.info({ owner, code, ...services.metrics.disconnected(owner), ...bytes }, 'disconnected');
    });
    this.#send(peer, encodeText({ ...this.#options.hello() }));
  }

  /** A peer that does not take its replies is not read from until it does; that it answers no pings then ends it. */
  #send(peer: Peer, frame: string | Uint8Array, left: () => void = () => {}): void {
    const { highWaterBytes } = this.#options;
    const { socket } = peer;
    if (socket.readyState !== socket.OPEN) {
      left();
      return;
    }
    socket.send(frame, { binary: typeof frame !== 'string' }, () => {
      left();
      if (peer.isBehind && socket.bufferedAmount < highWaterBytes / 8) {
        peer.isBehind = false;
        this.#flow(peer);
      }
    });
    if (socket.bufferedAmount <= highWaterBytes) return;
    peer.isBehind = true;
    this.#flow(peer);
  }

  /** Reads from a peer or does not, as things stand. */
  #flow({ socket, arrivals, isBehind }: Peer): void {
    if (arrivals.mustWait || isBehind) socket.pause();
    else if (socket.isPaused) socket.resume();
  }

  #ping(): void {
    for (const peer of this.#peers) {
      const { socket, stream } = peer;
      // A pong may wait behind a large frame that still arrives: bytes are a sign of life too.
      if (stream.bytesRead !== peer.bytesRead) peer.missedPings = 0;
      peer.bytesRead = stream.bytesRead;
      const reason = this.#reasonToEnd(peer);
      if (reason !== null) {
        this.#options.log.warn({ owner: peer.session.owner }, `terminated: ${reason}`);
        socket.terminate();
        continue;
      }
      // Who must wait for memory is not listened to, so it cannot be heard to answer.
      if (!peer.arrivals.mustWait) peer.missedPings += 1;
      socket.ping();
    }
  }

  #reasonToEnd({ missedPings, arrivals }: Peer): string | null {
    if (missedPings >= MAX_MISSED_PINGS) return `missed ${MAX_MISSED_PINGS} pings`;
    const since = arrivals.arrivingSince;
    if (since === null || !this.#intake.isShort || performance.now() - since < ARRIVAL_MS) return null;
    return `its message takes over ${ARRIVAL_MS / 1000} s to arrive and holds memory that others wait for`;
  }
}

/** What has gone over a socket, the HTTP of its upgrade included. */
function bytesOf(stream: Socket): { readonly receivedBytes: number; readonly sentBytes: number } {
  return { receivedBytes: stream.bytesRead, sentBytes: stream.bytesWritten };
}
