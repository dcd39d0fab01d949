/**
 * A server as a process of its own under clients in closed loops: requests a second, latencies, how many share a forward, and
 * what a request costs beside it. One client alone is the serial case that the others are compared with.
 */
import { fileURLToPath } from 'node:url';
import { Client, type ForwardRequest, type Timing } from '../src/client.ts';
import { fromF32 } from '../src/half.ts';
import { generateTensor } from '../test/fixtures/weights.ts';
import { launch } from '../test/launch.ts';
import { type Facts, factsOf, writeResult } from './facts.ts';
import { FOLDER, FULL_MODELS, type FullModel, modelFile, stepOf } from './full-size.ts';
import { median, quantile, treeCpuMs } from './measure.ts';

export interface ServerBenchOptions {
  readonly model: FullModel | 'demo';
  /** Latent pixels a side. */
  readonly size: number;
  /** Images of one request: 2 is a step with guidance. */
  readonly images: number;
  readonly clients: readonly number[];
  readonly seconds: number;
  readonly rounds: number;
  readonly json?: string | undefined;
  readonly adapter?: string | undefined;
}

interface Answer {
  readonly latencyMs: number;
  readonly timing: Timing;
}

/** Some clients over some seconds. */
interface Round {
  readonly answers: readonly Answer[];
  readonly seconds: number;
  /** Processor time of the server and its engine. */
  readonly cpuMs: number | undefined;
}

interface Row {
  readonly clients: number;
  readonly requests: number;
  readonly requestsPerSecond: number;
  /** Throughput over that of one client. */
  readonly overSerial: number;
  readonly latencyMs: { readonly p50: number; readonly p95: number; readonly p99: number };
  /** Requests of the forward that a request was part of. */
  readonly meanBatch: number;
  readonly gpuMs: number;
  readonly queueMs: number;
  /** Median of a request's latency without its wait for the forward and the forward: sockets, codec, two processes. */
  readonly besideMs: number;
  readonly cpuMsPerRequest: number | undefined;
}

export interface ServerResult extends Pick<ServerBenchOptions, 'model' | 'size' | 'images'> {
  readonly rows: readonly Row[];
}

/** The folder that holds the model, and its name there. */
function placed(model: ServerBenchOptions['model']): { readonly folder: string; readonly name: string } {
  if (model === 'demo')
    return {
      folder: fileURLToPath(new URL('../demo/assets/models', import.meta.url)),
      name: 'emoji-unet.safetensors',
    };
  return { folder: FOLDER, name: `${modelFile(model).name}.safetensors` };
}

async function requestOf(
  client: Client,
  name: string,
  { model, size, images }: ServerBenchOptions,
): Promise<ForwardRequest> {
  const { config } = await client.modelLoad(name);
  if (model !== 'demo') {
    const { loras: _, control: __, ...tensors } = stepOf(images, size, model);
    return { model: name, ...tensors };
  }
  const tensor = (what: string, shape: readonly number[]) => ({
    dtype: 'F16' as const,
    shape,
    data: fromF32('F16', generateTensor(`@${what}`, shape)),
  });
  return {
    model: name,
    x: tensor('x', [images, config.inChannels, size, size]),
    timesteps: {
      ...tensor('t', [images]),
      dtype: 'F32',
      data: fromF32('F32', new Float32Array(images).fill(500)),
    },
    context: tensor('context', [images, 16, config.contextDim]),
  };
}

/** Each client sends its next request when it has the answer to the one before. */
async function loop(
  clients: readonly Client[],
  request: ForwardRequest,
  seconds: number,
  serverPid: number,
): Promise<Round> {
  const answers: Answer[] = [];
  const cpu = treeCpuMs(serverPid);
  const begun = performance.now();
  const until = begun + seconds * 1000;
  await Promise.all(
    clients.map(async (client) => {
      do {
        const sent = performance.now();
        const { timing } = await client.forward(request);
        answers.push({ latencyMs: performance.now() - sent, timing });
      } while (performance.now() < until);
    }),
  );
  const cpuAfter = treeCpuMs(serverPid);
  return {
    answers,
    seconds: (performance.now() - begun) / 1000,
    cpuMs: cpu === undefined || cpuAfter === undefined ? undefined : cpuAfter - cpu,
  };
}

function rowOf(clients: number, rounds: readonly Round[], serial: number | undefined): Row {
  const answers = rounds.flatMap((round) => round.answers);
  const sum = (of: (round: Round) => number): number => rounds.reduce((total, round) => total + of(round), 0);
  const latencies = answers.map(({ latencyMs }) => latencyMs).sort((a, b) => a - b);
  const requestsPerSecond = answers.length / sum(({ seconds }) => seconds);
  const cpuMs = sum((round) => round.cpuMs ?? Number.NaN);
  return {
    clients,
    requests: answers.length,
    requestsPerSecond,
    overSerial: requestsPerSecond / (serial ?? requestsPerSecond),
    latencyMs: {
      p50: quantile(latencies, 0.5),
      p95: quantile(latencies, 0.95),
      p99: quantile(latencies, 0.99),
    },
    meanBatch: answers.reduce((total, { timing }) => total + timing.batchedRequests, 0) / answers.length,
    gpuMs: median(answers.map(({ timing }) => timing.gpuMs)),
    queueMs: median(answers.map(({ timing }) => timing.queueMs)),
    besideMs: median(answers.map(({ latencyMs, timing }) => latencyMs - timing.queueMs - timing.gpuMs)),
    cpuMsPerRequest: Number.isNaN(cpuMs) ? undefined : cpuMs / answers.length,
  };
}

function show(row: Row): void {
  const { clients, requests, requestsPerSecond, overSerial, latencyMs, meanBatch, besideMs } = row;
  const ms = (value: number, width = 9): string => value.toFixed(1).padStart(width);
  console.log(
    `${String(clients).padStart(7)}${String(requests).padStart(9)}${requestsPerSecond.toFixed(2).padStart(9)}` +
      `${overSerial.toFixed(2).padStart(8)}x${ms(latencyMs.p50)}${ms(latencyMs.p95)}${ms(latencyMs.p99)}` +
      `${meanBatch.toFixed(1).padStart(7)}${ms(row.gpuMs)}${ms(besideMs, 8)}${ms(row.cpuMsPerRequest ?? Number.NaN, 10)}`,
  );
}

/** All clients stay connected; each round asks with 1, then 2, ... of them, so that drift hits all alike. */
async function measured(
  url: string,
  serverPid: number,
  name: string,
  options: ServerBenchOptions,
): Promise<{ readonly facts: Facts; readonly rows: readonly Row[] }> {
  const counts = [...new Set([1, ...options.clients])].sort((a, b) => a - b);
  const clients: Client[] = [];
  try {
    while (clients.length < counts.at(-1)!) clients.push(await Client.connect(url));
    const facts = factsOf(clients[0]!.hello.device);
    const request = await requestOf(clients[0]!, name, options);
    const rounds = new Map(counts.map((count) => [count, [] as Round[]]));
    // Every batch size is compiled before it counts.
    for (const count of counts) await loop(clients.slice(0, count), request, 0, serverPid);
    for (let round = 0; round < options.rounds; round++)
      for (const count of counts)
        rounds.get(count)!.push(await loop(clients.slice(0, count), request, options.seconds, serverPid));
    const serial = rowOf(1, rounds.get(1)!, undefined).requestsPerSecond;
    return { facts, rows: counts.map((count) => rowOf(count, rounds.get(count)!, serial)) };
  } finally {
    await Promise.all(clients.map((client) => client.close()));
  }
}

export async function benchServer(options: ServerBenchOptions): Promise<void> {
  const { model, size, images, adapter } = options;
  const { folder, name } = placed(model);
  const server = await launch(
    ...['--models', folder, '--port', '0', '--log-level', 'warn'],
    ...(adapter ? ['--adapter', adapter] : []),
  );
  try {
    const { facts, rows } = await measured(server.url, server.child.pid!, name, options);
    console.log(
      `${model === 'demo' ? 'demo model' : FULL_MODELS[model]}, latents ${size}x${size}, ${images} images a request; times in ms`,
    );
    console.log(
      'clients requests req./s  / serial      p50      p95      p99  batch  forward  beside processor',
    );
    for (const row of rows) show(row);
    writeResult(options.json, 'server', facts, { model, size, images, rows } satisfies ServerResult);
  } finally {
    server.child.kill('SIGTERM');
    await server.exited;
  }
}
