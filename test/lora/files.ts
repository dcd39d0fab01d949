/** Small LoRA files for the tests of this folder: tensors with known values under kohya names. */
import { expect } from 'vitest';
import { UnetdError } from '../../src/errors.ts';
import { fromF32 } from '../../src/half.ts';
import { type Adapter, parseAdapter } from '../../src/lora/adapter.ts';
import { type Dtype, decode, encode, type TensorView } from '../../src/safetensors.ts';
import type { Layer, UNetConfig } from '../../src/unet/config.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { layersOf } from '../../src/unet/layers.ts';
import { shapesOf } from '../fixtures/shapes/load.ts';
import { type Entry, writeTensors } from '../fixtures/weights.ts';

export const SD15: UNetConfig = detectUNet(shapesOf('sd15'));
export const SDXL: UNetConfig = detectUNet(shapesOf('sdxl'));
export const LINEAR = 'input_blocks.1.1.transformer_blocks.0.attn1.to_q';
export const CONV1 = 'input_blocks.1.1.proj_in';
export const CONV3 = 'input_blocks.1.0.in_layers.2';
export const FF = 'input_blocks.1.1.transformer_blocks.0.ff.net.2';
/** A linear layer with a bias. */
export const BIASED = 'input_blocks.1.1.transformer_blocks.0.attn1.to_out.0';
export const NORM = 'input_blocks.1.1.transformer_blocks.0.norm1';

export function layer(id: string): Layer {
  return layersOf(SD15).find((candidate) => candidate.id === id)!;
}

export function count(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

/** Values that f16 and bf16 hold exactly, different at every index. */
export function values(length: number, seed: number): Float32Array {
  return Float32Array.from({ length }, (_, i) => ((((i + 1) * (2 * seed + 7919)) % 251) - 125) / 128);
}

export function tensor(
  name: string,
  shape: readonly number[],
  seed = 1,
  dtype: 'F32' | 'F16' | 'BF16' = 'F32',
): TensorView {
  return { name, dtype, shape, data: fromF32(dtype, values(count(shape), seed)) };
}

export function raw(
  name: string,
  dtype: Dtype,
  shape: readonly number[],
  bytes: readonly number[],
): TensorView {
  return { name, dtype, shape, data: Uint8Array.from(bytes) };
}

export function flat(id: string): string {
  return `lora_unet_${id.replaceAll('.', '_')}`;
}

export function pair(
  id: string,
  down: readonly number[],
  up: readonly number[],
  dtype: 'F32' | 'F16' | 'BF16' = 'F32',
): TensorView[] {
  return [
    tensor(`${flat(id)}.lora_down.weight`, down, 1, dtype),
    tensor(`${flat(id)}.lora_up.weight`, up, 2, dtype),
  ];
}

export function parse(tensors: readonly TensorView[], config: UNetConfig = SD15): Promise<Adapter> {
  return parseAdapter(decode(encode(tensors)), config, 'pixel');
}

export async function failure(
  tensors: readonly TensorView[],
  config: UNetConfig = SD15,
): Promise<UnetdError> {
  const error: unknown = await parse(tensors, config).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(UnetdError);
  return error as UnetdError;
}

/** The parts of a layer by their endings. */
export const file = (id: string, shapes: Readonly<Record<string, readonly number[]>>): TensorView[] =>
  Object.entries(shapes).map(([ending, shape], i) => tensor(`${flat(id)}.${ending}`, shape, i + 1));

/** Writes a LoRA of one rank, with values of its own, for the layers whose id matches. */
export function writeAdapter(
  path: string,
  name: string,
  layers: readonly Layer[],
  rank: number,
  ids: RegExp,
): void {
  const entries = layers
    .filter(({ id }) => ids.test(id))
    .flatMap(({ id, kind, inFeatures, outFeatures, kernel }): readonly Entry[] => {
      const conv = kind === 'conv';
      const entry = (part: string, shape: readonly number[]): Entry => {
        const key = `${flat(id)}.${part}.weight`;
        return { key, shape, from: `#${name}/${key}` };
      };
      return [
        entry('lora_down', [rank, inFeatures, ...(conv ? [kernel, kernel] : [])]),
        entry('lora_up', [outFeatures, rank, ...(conv ? [1, 1] : [])]),
      ];
    });
  writeTensors(path, entries, 'F16');
}
