/**
 * How long loading a full-size UNet takes, beside what bounds it: reading its file and copying as many bytes on the adapter, in
 * turns. The file is read once before, so that it lies in the machine's cache.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { cpus } from 'node:os';
import { Engine } from '../src/engine/engine.ts';
import type { StorageDtype } from '../src/engine/types.ts';
import { Device, Usage } from '../src/gpu/device.ts';
import { factsOf, writeResult } from './facts.ts';
import { type FullModel, modelFile } from './full-size.ts';
import { median } from './measure.ts';

export interface LoadBenchOptions {
  readonly model: FullModel;
  readonly dtypes: readonly StorageDtype[];
  readonly rounds: number;
  readonly json?: string | undefined;
  readonly adapter?: string | undefined;
}

const READ_BYTES = 16 * 1024 * 1024;
/** Past what a processor's caches hold. */
const COPY_BYTES = 128 * 1024 * 1024;

/** Seconds by the clock, and of the processor over all cores. */
interface Took {
  readonly wall: number;
  readonly core: number;
}

async function timed(work: () => Promise<unknown>): Promise<Took> {
  const before = process.cpuUsage();
  const started = performance.now();
  await work();
  const wall = (performance.now() - started) / 1e3;
  const { user, system } = process.cpuUsage(before);
  return { wall, core: (user + system) / 1e6 / cpus().length };
}

async function readAll(file: FileHandle, sizeBytes: number): Promise<void> {
  const chunk = new Uint8Array(READ_BYTES);
  for (let at = 0; at < sizeBytes; at += READ_BYTES) await file.read(chunk, 0, READ_BYTES, at);
}

async function copyAll(device: Device, buffers: readonly GPUBuffer[], sizeBytes: number): Promise<void> {
  const encoder = device.gpu.createCommandEncoder();
  for (let at = 0; at < sizeBytes; at += COPY_BYTES)
    encoder.copyBufferToBuffer(buffers[0]!, 0, buffers[1]!, 0, Math.min(COPY_BYTES, sizeBytes - at));
  device.gpu.queue.submit([encoder.finish()]);
  await device.settle(() => device.gpu.queue.onSubmittedWorkDone());
}

export interface LoadResult {
  readonly model: FullModel;
  readonly sizeBytes: number;
  readonly rounds: number;
  /** Medians; by processor time, over all cores. */
  readonly rows: readonly { readonly name: string; readonly seconds: number; readonly coreSeconds: number }[];
}

export async function benchLoad({ model, dtypes, rounds, json, adapter }: LoadBenchOptions): Promise<void> {
  const source = modelFile(model);
  const device = await Device.open({ adapter });
  const engine = await Engine.create(adapter === undefined ? {} : { adapter });
  const facts = factsOf(device.adapter);
  const file = await open(source.path);
  const { size: sizeBytes } = await file.stat();
  const usage = Usage.COPY_SRC | Usage.COPY_DST;
  const buffers = [0, 1].map(() => device.createBuffer('copied', COPY_BYTES, usage));
  const works = new Map<string, () => Promise<unknown>>([
    ['read the file', () => readAll(file, sizeBytes)],
    ['copy as many bytes', () => copyAll(device, buffers, sizeBytes)],
    ...dtypes.map(
      (dtype) => [`load as ${dtype}`, () => engine.loadModel({ ...source, name: dtype }, dtype)] as const,
    ),
  ]);
  const took = new Map([...works.keys()].map((name): [string, Took[]] => [name, []]));
  for (let round = -1; round < rounds; round++)
    for (const [name, work] of works) {
      const one = await timed(work);
      if (round >= 0) took.get(name)!.push(one);
      for (const dtype of dtypes) if (name === `load as ${dtype}`) await engine.unloadModel(dtype);
    }
  const rows = [...took].map(([name, all]) => ({
    name,
    seconds: median(all.map(({ wall }) => wall)),
    coreSeconds: median(all.map(({ core }) => core)),
  }));
  console.log(`${model}, ${(sizeBytes / 1e9).toFixed(2)} GB; in brackets by processor time over all cores`);
  const rate = (seconds: number): string => (sizeBytes / 1e9 / seconds).toFixed(2).padStart(5);
  for (const { name, seconds, coreSeconds } of rows)
    console.log(
      `${name.padEnd(20)} ${seconds.toFixed(2).padStart(5)} (${coreSeconds.toFixed(2)}) s ${rate(seconds)} (${rate(coreSeconds)}) GB/s`,
    );
  writeResult(json, 'load', facts, { model, sizeBytes, rounds, rows } satisfies LoadResult);
  await file.close();
  await engine.close();
  for (const buffer of buffers) buffer.destroy();
  device.close();
}
