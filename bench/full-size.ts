/**
 * The full-size SD 1.5 UNet and adapters for it, with weights from the tests' generator: files under `.cache/bench`, made
 * once. What a forward of it costs in arithmetic is counted here too. Measures nothing.
 */
import { existsSync, mkdirSync, renameSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { FileSource, StepRequest, TensorData } from '../src/engine/types.ts';
import type { Capabilities, Resident } from '../src/gpu/kernel.ts';
import { fromF32 } from '../src/half.ts';
import type { UNetConfig } from '../src/unet/config.ts';
import { detectUNet } from '../src/unet/detect.ts';
import { layersOf, partsOf } from '../src/unet/layers.ts';
import { planUNet, type UNetPlan } from '../src/unet/plan.ts';
import { shapesOf } from '../test/fixtures/shapes/load.ts';
import { type Entry, generateTensor, writeCheckpoint, writeTensors } from '../test/fixtures/weights.ts';

const FOLDER = fileURLToPath(new URL('../.cache/bench/', import.meta.url));
const CONTEXT_TOKENS = 77;

export const CONFIG: UNetConfig = detectUNet(shapesOf('sd15'));

/** An adapter of one rank for the linear layers of the transformers (and their 1x1 projections), or for every layer but the
 * embeddings and the ends (`conv`). Equal facts are the same file. */
export interface AdapterShape {
  readonly rank: number;
  readonly conv?: boolean;
  /** Tells files of one shape apart. */
  readonly seed?: number;
}

const nameOf = ({ rank, conv, seed = 0 }: AdapterShape): string =>
  `${conv ? 'locon' : 'lora'}-${rank}-${seed}`;

const LINEAR = /\.(transformer_blocks\.\d+\..*|proj_in|proj_out)$/;
/** What LoCon trainers reach: everything inside ResBlocks and transformers, and the resampling convolutions. */
const LOCON = /^(input_blocks\.(?!0\.0$)|middle_block|output_blocks)/;

const isAdapted = (id: string, { conv }: AdapterShape): boolean => (conv ? LOCON : LINEAR).test(id);

/** Makes a file unless it is there; whole or not at all. */
function once(name: string, write: (path: string) => void): FileSource {
  mkdirSync(FOLDER, { recursive: true });
  const path = `${FOLDER}${name}.safetensors`;
  if (!existsSync(path)) {
    write(`${path}.part`);
    renameSync(`${path}.part`, path);
  }
  return { name, path, version: '1' };
}

/** The checkpoint, 1.7 GB. */
export const modelFile = (): FileSource =>
  once('sd15', (path) =>
    writeCheckpoint(path, Object.fromEntries(shapesOf('sd15')), { dtype: 'F16', layout: 'bare' }),
  );

export const adapterFile = (shape: AdapterShape): FileSource =>
  once(nameOf(shape), (path) => {
    const entries = layersOf(CONFIG)
      .filter(({ id }) => isAdapted(id, shape))
      .flatMap(({ id, kind, inFeatures, outFeatures, kernel }): readonly Entry[] => {
        const { rank } = shape;
        const square = kind === 'conv' ? [kernel, kernel] : [];
        const ones = kind === 'conv' ? [1, 1] : [];
        const entry = (part: string, dims: readonly number[]): Entry => {
          const key = `lora_unet_${id.replaceAll('.', '_')}.${part}.weight`;
          return { key, shape: dims, from: `#${nameOf(shape)}/${key}` };
        };
        return [
          entry('lora_down', [rank, inFeatures, ...square]),
          entry('lora_up', [outFeatures, rank, ...ones]),
        ];
      });
    writeTensors(path, entries, 'F16');
  });

function tensor(name: string, shape: readonly number[]): TensorData {
  return { dtype: 'F16', shape, data: fromF32('F16', generateTensor(`@${name}`, shape)) };
}

/** A step of `images` images of size x size latent pixels. */
export function stepOf(images: number, size: number): StepRequest {
  const timesteps = Float32Array.from({ length: images }, (_, i) => 800 - 100 * i);
  return {
    loras: [],
    x: tensor(`x${size}`, [images, CONFIG.inChannels, size, size]),
    timesteps: { dtype: 'F32', shape: [images], data: fromF32('F32', timesteps) },
    context: tensor('context', [images, CONTEXT_TOKENS, CONFIG.contextDim]),
  };
}

/** Multiply-adds of one image's forward, and of the low-rank terms of adapters beside it. */
export interface Arithmetic {
  readonly base: number;
  readonly lowRank: (adapter: AdapterShape) => number;
}

/** Counted from the plan that the engine runs; ranks as they are, without padding. */
export function arithmeticOf(size: number): Arithmetic {
  const { spec, inputs } = drafted(size);
  const rows = new Map(inputs.flatMap((input) => input.slots.map((slot) => [slot, input.rows] as const)));
  const base = spec.steps
    .flatMap((step) => (step.kind === 'always' ? [step.dispatch] : step.slots.flatMap((slot) => slot.base)))
    .reduce((sum, { flops }) => sum + flops / 2, 0);
  return {
    base,
    lowRank: (adapter) =>
      layersOf(CONFIG).reduce((sum, { id, inFeatures, outFeatures, kernel }, slot) => {
        const perRow = adapter.rank * (kernel ** 2 * inFeatures + outFeatures);
        return isAdapted(id, adapter) ? sum + (rows.get(slot) ?? 0) * perRow : sum;
      }, 0),
  };
}

function drafted(size: number): UNetPlan {
  const parts = new Map(partsOf(CONFIG).map((part) => [part.id, part]));
  const slots = new Map(layersOf(CONFIG).map(({ id }, slot) => [id, slot]));
  const unbound = (sizeBytes: number): Resident => ({
    kind: 'resident',
    label: 'unbound',
    current: () => {
      throw new Error('this plan is only counted');
    },
    offset: 0,
    sizeBytes,
  });
  const capabilities: Capabilities = {
    subgroupSize: 0,
    software: false,
    maxBindingBytes: 2 ** 27,
    maxBufferBytes: 2 ** 28,
    offsetAlignment: 256,
  };
  const weights = {
    matrix: (id: string) => {
      const { inFeatures, outFeatures, kernel } = parts.get(id)!;
      const range = (_offset: number, sizeBytes: number): Resident => unbound(sizeBytes);
      return { slot: slots.get(id)!, inFeatures, outFeatures, kernel, range };
    },
    vector: (name: string) => {
      const part = parts.get(name.replace(/\.(weight|bias)$/, ''))!;
      return name.endsWith('.bias') && !part.bias ? undefined : unbound(0);
    },
  };
  const lora = (slot: number) => ({ slot, pool: unbound(0), table: unbound(0), t: unbound(0) });
  const shape = { images: 1, height: size, width: size, contextTokens: CONTEXT_TOKENS, control: {} };
  return planUNet(CONFIG, shape, { storage: 'f16', capabilities, weights, lora });
}
