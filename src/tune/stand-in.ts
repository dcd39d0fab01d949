/**
 * Files of random weights for measuring without a model: UNets of the shape of SD 1.5 and SDXL, and an adapter for any UNet.
 * What they compute means nothing.
 */
import { randomFillSync } from 'node:crypto';
import { closeSync, openSync, writeSync } from 'node:fs';
import { headOf } from '../safetensors-header.ts';
import type { UNetConfig, UNetModule } from '../unet/config.ts';
import { layersOf, tensorsOf } from '../unet/layers.ts';

export const ARCHITECTURE_NAMES = ['sd15', 'sdxl'] as const;
export type ArchitectureName = (typeof ARCHITECTURE_NAMES)[number];

interface Architecture {
  /** Channels of each level, in multiples of 320. */
  readonly widths: readonly number[];
  /** Transformer blocks of each level, and of the middle. */
  readonly depths: readonly number[];
  readonly middleDepth: number;
  readonly contextDim: number;
  readonly admChannels: number | null;
  readonly linearProjection: boolean;
}

/** Rombach et al. 2022 and Podell et al. 2023, as their configuration files have it. */
const ARCHITECTURES: Readonly<Record<ArchitectureName, Architecture>> = {
  sd15: {
    widths: [1, 2, 4, 4],
    depths: [1, 1, 1, 0],
    middleDepth: 1,
    contextDim: 768,
    admChannels: null,
    linearProjection: false,
  },
  sdxl: {
    widths: [1, 2, 4],
    depths: [0, 2, 10],
    middleDepth: 10,
    contextDim: 2048,
    admChannels: 2816,
    linearProjection: true,
  },
};

const MODEL_CHANNELS = 320;
const RES_BLOCKS = 2;

/** Two ResBlocks a level going down and three going up, each with a transformer where the level has any. */
export function configOf(name: ArchitectureName): UNetConfig {
  const { widths, depths, middleDepth, contextDim, admChannels, linearProjection } = ARCHITECTURES[name];
  const transformer = (id: string, channels: number, depth: number): readonly UNetModule[] => {
    const heads = linearProjection ? channels / 64 : 8;
    const headDim = channels / heads;
    const shape = { channels, depth, heads, headDim, contextDim, linearProjection };
    return depth > 0 ? [{ kind: 'transformer', id, ...shape }] : [];
  };
  const input: (readonly UNetModule[])[] = [
    [{ kind: 'conv', id: 'input_blocks.0.0', inChannels: 4, outChannels: MODEL_CHANNELS }],
  ];
  const skips = [MODEL_CHANNELS];
  let channels = MODEL_CHANNELS;
  const res = (id: string, outChannels: number, skip = 0): UNetModule => {
    const inChannels = channels + skip;
    channels = outChannels;
    return { kind: 'res', id, inChannels, outChannels };
  };
  widths.forEach((width, level) => {
    for (let i = 0; i < RES_BLOCKS; i++) {
      const id = `input_blocks.${input.length}`;
      const own = res(`${id}.0`, width * MODEL_CHANNELS);
      input.push([own, ...transformer(`${id}.1`, channels, depths[level]!)]);
      skips.push(channels);
    }
    if (level === widths.length - 1) return;
    input.push([{ kind: 'down', id: `input_blocks.${input.length}.0`, channels }]);
    skips.push(channels);
  });
  const middle = [
    res('middle_block.0', channels),
    ...transformer('middle_block.1', channels, middleDepth),
    res('middle_block.2', channels),
  ];
  const output: (readonly UNetModule[])[] = [];
  for (let level = widths.length - 1; level >= 0; level--) {
    for (let i = 0; i <= RES_BLOCKS; i++) {
      const id = `output_blocks.${output.length}`;
      const block = [res(`${id}.0`, widths[level]! * MODEL_CHANNELS, skips.pop())];
      block.push(...transformer(`${id}.1`, channels, depths[level]!));
      if (i === RES_BLOCKS && level > 0) block.push({ kind: 'up', id: `${id}.${block.length}`, channels });
      output.push(block);
    }
  }
  const ends = { inChannels: 4, outChannels: 4, modelChannels: MODEL_CHANNELS };
  return { ...ends, timeEmbedDim: 4 * MODEL_CHANNELS, contextDim, admChannels, input, middle, output };
}

/** A checkpoint in F16: 1.7 GB for SD 1.5, 5.1 GB for SDXL. */
export function writeModel(path: string, config: UNetConfig): void {
  writeRandom(path, tensorsOf(config));
}

/** An adapter for all linear layers and 1x1 convolutions but those of the embeddings. */
export function writeAdapter(path: string, config: UNetConfig, rank: number): void {
  const tensors = new Map<string, readonly number[]>();
  for (const { id, kind, inFeatures, outFeatures, kernel } of layersOf(config)) {
    if (kernel !== 1 || /emb/.test(id)) continue;
    const square = kind === 'conv' ? [1, 1] : [];
    tensors.set(`diffusion_model.${id}.lora_down.weight`, [rank, inFeatures, ...square]);
    tensors.set(`diffusion_model.${id}.lora_up.weight`, [outFeatures, rank, ...square]);
  }
  writeRandom(path, tensors);
}

const BLOCK_BYTES = 2 ** 20;

/** A safetensors file of halves between 1/32 and 1/16, of either sign: one block of them again and again. */
function writeRandom(path: string, tensors: ReadonlyMap<string, readonly number[]>): void {
  let end = 0;
  const entries = [...tensors].map(([name, shape]) => {
    const start = end;
    end += 2 * shape.reduce((product, size) => product * size, 1);
    return [name, { dtype: 'F16', shape, data_offsets: [start, end] }] as const;
  });
  const head = headOf(JSON.stringify(Object.fromEntries(entries)), path);
  const halves = randomFillSync(new Uint16Array(BLOCK_BYTES / 2)).map((bits) => (bits & 0x83ff) | 0x2800);
  const block = new Uint8Array(halves.buffer);
  const file = openSync(path, 'w');
  try {
    writeSync(file, head);
    for (let at = 0; at < end; at += BLOCK_BYTES)
      writeSync(file, block.subarray(0, Math.min(BLOCK_BYTES, end - at)));
  } finally {
    closeSync(file);
  }
}
