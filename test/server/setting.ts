/** Folders, tensors and servers that the tests of the server share. No test itself. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Logger, pino } from 'pino';
import { Client, type ClientTensor, tensorFrom } from '../../src/client.ts';
import { fromF32 } from '../../src/half.ts';
import { encode, type TensorView } from '../../src/safetensors.ts';
import { type RunningServer, type ServeOptions, serve } from '../../src/server/serve.ts';
import type { UNetConfig, UNetModule } from '../../src/unet/config.ts';
import { StandInEngine } from './stand-in-engine.ts';

export const SILENT: Logger = pino({ level: 'silent' });

const res = (id: string, inChannels: number, outChannels: number): UNetModule => ({
  kind: 'res',
  id,
  inChannels,
  outChannels,
});

/** Three input blocks, one of them halving the size. */
export const CONFIG: UNetConfig = {
  inChannels: 4,
  outChannels: 4,
  modelChannels: 8,
  timeEmbedDim: 32,
  contextDim: 6,
  admChannels: null,
  input: [
    [{ kind: 'conv', id: 'input_blocks.0.0', inChannels: 4, outChannels: 8 }],
    [{ kind: 'down', id: 'input_blocks.1.0', channels: 8 }],
    [res('input_blocks.2.0', 8, 16)],
  ],
  middle: [res('middle_block.0', 16, 16)],
  output: [
    [res('output_blocks.0.0', 32, 16)],
    [res('output_blocks.1.0', 24, 8), { kind: 'up', id: 'output_blocks.1.1', channels: 8 }],
    [res('output_blocks.2.0', 16, 8)],
  ],
};

export function tensor(
  name: string,
  values: readonly number[],
  shape: readonly number[] = [values.length],
): TensorView {
  return { name, dtype: 'F32', shape, data: fromF32('F32', Float32Array.from(values)) };
}

/** Numbers that differ between seeds, small enough to be exact in f16. */
export function filled(shape: readonly number[], seed = 0, dtype: 'F32' | 'F16' = 'F32'): ClientTensor {
  const count = shape.reduce((product, size) => product * size, 1);
  return tensorFrom(
    Float32Array.from({ length: count }, (_, i) => ((i * 7 + seed * 13) % 32) / 8 - 2),
    shape,
    dtype,
  );
}

export function modelFile(
  metadata: Readonly<Record<string, string>> = {},
  config: UNetConfig = CONFIG,
): Uint8Array {
  const all = new Map(Object.entries({ config: JSON.stringify(config), ...metadata }));
  return encode([tensor('small', [1, 2, 3]), tensor('large', new Array(20_000).fill(0))], all);
}

export function loraFile(factor: number): Uint8Array {
  return encode([tensor('factor', [factor])]);
}

export interface Place {
  readonly dir: string;
  write(name: string, bytes: Uint8Array): void;
  remove(): void;
}

export function makePlace(): Place {
  const dir = mkdtempSync(join(tmpdir(), 'unetd-test-'));
  const write = (name: string, bytes: Uint8Array): void => {
    const path = join(dir, name);
    mkdirSync(join(path, '..'), { recursive: true });
    writeFileSync(path, bytes);
  };
  return { dir, write, remove: () => rmSync(dir, { recursive: true, force: true }) };
}

/** Two models that differ in speed, and two LoRAs, as ComfyUI lays them out. */
export function comfyPlace(delayMs = 0): Place {
  const place = makePlace();
  place.write('checkpoints/fast.safetensors', modelFile());
  place.write('checkpoints/slow.safetensors', modelFile({ delayMs: String(delayMs) }));
  place.write('unet/sub/small.safetensors', modelFile({ maxImages: '2' }));
  place.write('loras/double.safetensors', loraFile(1));
  place.write('loras/styles/minus.safetensors', loraFile(-0.5));
  return place;
}

export interface Stage {
  readonly engine: StandInEngine;
  readonly server: RunningServer;
  /** `http://127.0.0.1:PORT` */
  readonly origin: string;
  connect(token?: string): Promise<Client>;
  end(): Promise<void>;
}

export async function openStage(
  place: Place,
  options: Partial<ServeOptions> = {},
  engine: StandInEngine = new StandInEngine(),
): Promise<Stage> {
  const server = await serve({ engine, log: SILENT, models: [place.dir], port: 0, ...options });
  const clients: Client[] = [];
  return {
    engine,
    server,
    origin: server.url.replace('ws:', 'http:').replace('/v1', ''),
    connect: async (token) => {
      const client = await Client.connect(server.url, token === undefined ? {} : { token });
      clients.push(client);
      return client;
    },
    end: async () => {
      for (const client of clients) await client.close();
      await server.close();
    },
  };
}

/** A forward of `images` images; seeds make them differ. */
export function request(
  model: string,
  images = 1,
  seed = 0,
  size = 4,
): { model: string; x: ClientTensor; timesteps: ClientTensor; context: ClientTensor } {
  return {
    model,
    x: filled([images, 4, size, size], seed),
    timesteps: filled([images], seed + 1),
    context: filled([images, 3, 6], seed + 2),
  };
}

/** Waits until so many forwards wait and run on the server. */
export async function untilQueued(client: Client, waiting: number, running: number): Promise<void> {
  for (;;) {
    const { queue } = await client.stats();
    if (queue.requests === waiting && queue.running === running) return;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}
