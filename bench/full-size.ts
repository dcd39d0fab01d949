/**
 * The full-size UNets of SD 1.5 and SDXL, and adapters for SD 1.5, with weights from the tests' generator: files under
 * `.cache/bench`, made once. What a forward costs in arithmetic is counted here too. Measures nothing.
 */
import { existsSync, mkdirSync, renameSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { FileSource, StepRequest, TensorData } from '../src/engine/types.ts';
import { fromF32 } from '../src/half.ts';
import type { UNetConfig } from '../src/unet/config.ts';
import { detectUNet } from '../src/unet/detect.ts';
import { layersOf } from '../src/unet/layers.ts';
import type { UNetShape } from '../src/unet/plan.ts';
import { shapesOf } from '../test/fixtures/shapes/load.ts';
import { type Entry, generateTensor, writeCheckpoint, writeTensors } from '../test/fixtures/weights.ts';
import { baseDispatches, drafted } from './draft.ts';

export const FOLDER: string = fileURLToPath(new URL('../.cache/bench/', import.meta.url));
const CONTEXT_TOKENS = 77;

/** Checkpoints in f16: 1.7 and 5.1 GB. */
export const FULL_MODELS = { sd15: 'SD 1.5', sdxl: 'SDXL' } as const;
export type FullModel = keyof typeof FULL_MODELS;

export const CONFIGS: Readonly<Record<FullModel, UNetConfig>> = {
  sd15: detectUNet(shapesOf('sd15')),
  sdxl: detectUNet(shapesOf('sdxl')),
};

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

export const modelFile = (model: FullModel = 'sd15'): FileSource =>
  once(model, (path) =>
    writeCheckpoint(path, Object.fromEntries(shapesOf(model)), { dtype: 'F16', layout: 'bare' }),
  );

export const adapterFile = (shape: AdapterShape): FileSource =>
  once(nameOf(shape), (path) => {
    const entries = layersOf(CONFIGS.sd15)
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

export const shapeOf = (images: number, size: number): UNetShape => ({
  images,
  height: size,
  width: size,
  contextTokens: CONTEXT_TOKENS,
  control: {},
});

/** A step of `images` images of size x size latent pixels. */
export function stepOf(images: number, size: number, model: FullModel = 'sd15'): StepRequest {
  const { inChannels, contextDim, admChannels } = CONFIGS[model];
  const timesteps = Float32Array.from({ length: images }, (_, i) => 800 - 100 * i);
  return {
    loras: [],
    x: tensor(`x${size}`, [images, inChannels, size, size]),
    timesteps: { dtype: 'F32', shape: [images], data: fromF32('F32', timesteps) },
    context: tensor('context', [images, CONTEXT_TOKENS, contextDim]),
    ...(admChannels === null ? {} : { y: tensor('y', [images, admChannels]) }),
  };
}

/** Multiply-adds of one image's forward, and of the low-rank terms of adapters beside it. */
export interface Arithmetic {
  readonly base: number;
  readonly lowRank: (adapter: AdapterShape) => number;
}

/** Counted from the plan that the engine runs; ranks as they are, without padding. */
export function arithmeticOf(size: number, model: FullModel = 'sd15'): Arithmetic {
  const config = CONFIGS[model];
  const plan = drafted(config, shapeOf(1, size));
  const rows = new Map(
    plan.inputs.flatMap((input) => input.slots.map((slot) => [slot, input.rows] as const)),
  );
  return {
    base: baseDispatches(plan).reduce((sum, { flops }) => sum + flops / 2, 0),
    lowRank: (adapter) =>
      layersOf(config).reduce((sum, { id, inFeatures, outFeatures, kernel }, slot) => {
        const perRow = adapter.rank * (kernel ** 2 * inFeatures + outFeatures);
        return isAdapted(id, adapter) ? sum + (rows.get(slot) ?? 0) * perRow : sum;
      }, 0),
  };
}
