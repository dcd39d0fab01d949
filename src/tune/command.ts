/**
 * `unetd tune`: loads a model, has its kernels' choices measured, writes them to the file that the server reads, and prints a
 * table of them.
 */
import { accessSync, constants, mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { Engine } from '../engine/engine.ts';
import { defaultTuningFile, readTunings, withTuning, writeTunings } from '../engine/tuning.ts';
import type { FileSource, ModelInfo, StorageDtype } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';
import { type ArchitectureName, configOf, writeAdapter, writeModel } from './stand-in.ts';
import { tableOf } from './table.ts';
import { stepOf, tune, type Workload } from './tune.ts';

export interface TuneFlags {
  /** Path of a model; random weights of the shape of `like` where left out. */
  readonly model?: string;
  readonly like: ArchitectureName;
  /** Latent pixels, height and width; what the model was trained for where left out. */
  readonly size?: readonly (readonly [number, number])[];
  readonly batch: readonly number[];
  readonly dtype: 'auto' | StorageDtype;
  readonly rounds: number;
  readonly adapter?: string;
  readonly tuning?: string;
}

/** Of the adapter that is run beside none: what most people train. */
const RANK = 16;

const sourceOf = (path: string): FileSource => ({ name: path, path, version: '0' });

export async function runTune(flags: TuneFlags): Promise<void> {
  const { rounds, tuning: path = defaultTuningFile(), adapter } = flags;
  const say = (line: string): void => void process.stderr.write(`${line}\n`);
  // Not to be found out when all is measured.
  mkdirSync(dirname(path), { recursive: true });
  accessSync(dirname(path), constants.W_OK);
  const engine = await Engine.create({ tuning: false, ...(adapter === undefined ? {} : { adapter }) });
  const folder = mkdtempSync(join(tmpdir(), 'unetd-tune-'));
  try {
    say(`measuring on ${engine.device.name}`);
    const workloads = await loadWorkloads(engine, folder, flags);
    const tuned = await tune(engine, workloads, { rounds, onProgress: say });
    process.stdout.write(tableOf(tuned));
    writeTunings(path, withTuning(formerTunings(path, say), engine.tunedFor, tuned.choices));
    process.stdout.write(`Written to ${path}\n`);
  } finally {
    rmSync(folder, { recursive: true, force: true });
    await engine.close();
  }
}

function formerTunings(path: string, say: (line: string) => void): ReturnType<typeof withTuning> {
  try {
    return readTunings(path) ?? [];
  } catch (error) {
    say(`${UnetdError.from(error).message}; it is written anew`);
    return [];
  }
}

/** Forwards of each size and batch, without any LoRA and with one. */
async function loadWorkloads(
  engine: Engine,
  folder: string,
  flags: TuneFlags,
): Promise<readonly [Workload, ...Workload[]]> {
  const { model, config } = await load(engine, folder, flags);
  const lora = sourceOf(join(folder, 'lora.safetensors'));
  writeAdapter(lora.path, config, RANK);
  await engine.loadAdapter(lora, model);
  const trained = config.admChannels === null ? 64 : 128;
  const sizes = flags.size ?? [[trained, trained] as const];
  const workloads = sizes.flatMap(([height, width]) =>
    flags.batch.flatMap((images) =>
      [[], [{ lora: lora.name, strength: 1 }]].map(
        (loras): Workload => ({
          label: `${height}x${width}, batch ${images}, ${loras.length > 0 ? `a LoRA of rank ${RANK}` : 'no LoRA'}`,
          batch: { model, requests: [stepOf(config, images, [height, width], loras)] },
        }),
      ),
    ),
  );
  return workloads as [Workload, ...Workload[]];
}

async function load(engine: Engine, folder: string, { model, like, dtype }: TuneFlags): Promise<ModelInfo> {
  if (model !== undefined) return engine.loadModel(sourceOf(resolve(model)), dtype);
  const path = join(folder, 'model.safetensors');
  try {
    writeModel(path, configOf(like));
    return await engine.loadModel(sourceOf(path), dtype);
  } finally {
    rmSync(path, { force: true });
  }
}
