/**
 * What the contenders run: kernels at shapes of SD 1.5, and whole forwards. Each with its case for our kernels, and the same
 * numbers in the layout that others take: NCHW, weights as PyTorch has them. Runs nothing.
 */
import { existsSync, mkdirSync, renameSync, writeFileSync } from 'node:fs';
import { toF32 } from '../../src/half.ts';
import { encode } from '../../src/safetensors.ts';
import { attentionCase } from '../../test/kernels/attention.cases.ts';
import type { Case } from '../../test/kernels/case.ts';
import { gemmCase, gemmData } from '../../test/kernels/gemm.cases.ts';
import type { GemmShape } from '../../test/kernels/gemm_shapes.ts';
import { groupNormCase } from '../../test/kernels/group_norm.cases.ts';
import { arithmeticOf, FOLDER, type FullModel, stepOf } from '../full-size.ts';

/** Where peers are installed, and their files lie. */
export const PEERS: string = `${FOLDER}peers/`;

export type Op = 'gemm' | 'conv' | 'attention' | 'group norm' | 'unet';

/** A work as a contender is told of it; everything but names it finds in files. */
export interface Job {
  readonly name: string;
  readonly op: Op;
  /** Applications of a run, one after the other: more than one where inputs and results would take most of the time. */
  readonly repeats: number;
  readonly heads: number;
  /** Inputs and weights, safetensors. */
  readonly data: string;
  /** `repeats` applications, and one. */
  readonly onnx: string;
  readonly onnxOnce: string;
  /** Of a whole forward. */
  readonly full?: Full;
  readonly checkpoint: string;
  readonly out: string;
}

/** `size`: latent pixels a side. */
interface Full {
  readonly model: FullModel;
  readonly size: number;
  readonly images: number;
}

interface Tensor {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

export interface Work {
  readonly name: string;
  readonly op: Op;
  readonly repeats: number;
  readonly heads: number;
  readonly flops: number;
  readonly full?: Full;
  readonly case?: Case;
  /** [rows, columns] of our result that others have as [columns, rows]. */
  readonly transposed?: readonly [rows: number, columns: number];
  readonly tensors: () => Readonly<Record<string, Tensor>>;
}

/** [rows, columns] to [columns, rows]. */
export function transpose(values: Float32Array, rows: number, columns: number): Float32Array {
  const out = new Float32Array(values.length);
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) out[c * rows + r] = values[r * columns + c]!;
  return out;
}

/** Values of an input as the case has them. */
const valuesOf = (one: Case, name: string): Float32Array =>
  one.build('f32').inputs[name]!.values as Float32Array;

/** Repeated, it has as many columns as channels. */
function gemmWork(m: number, k: number, n: number, repeats = 1): Work {
  const shape: GemmShape = { name: `gemm ${m}x${k}x${n}`, m, channels: k, n };
  return {
    ...{ name: shape.name, op: 'gemm', repeats, heads: 0, flops: 2 * m * k * n, case: gemmCase(shape) },
    tensors: () => {
      const { x, w } = gemmData(shape, 'f32');
      return { x: { shape: [m, k], values: x }, w: { shape: [k, n], values: transpose(w, n, k) } };
    },
  };
}

function convWork(channels: number, side: number): Work {
  const conv = { srcHeight: side, srcWidth: side, inHeight: side, inWidth: side, stride: 1 } as const;
  const name = `conv 3x3 ${channels}@${side}x${side}`;
  const shape: GemmShape = { name, channels, n: channels, conv, bias: true };
  const pixels = side * side;
  return {
    ...{ name, op: 'conv', repeats: 1, heads: 0, case: gemmCase(shape), transposed: [pixels, channels] },
    flops: 2 * 9 * channels * channels * pixels,
    tensors: () => {
      const { x, w, bias } = gemmData(shape, 'f32');
      // [out, tap, in] to [out, in, tap].
      const taps = new Float32Array(w.length);
      const each = 9 * channels;
      for (let o = 0; o < channels; o++)
        taps.set(transpose(w.subarray(o * each, (o + 1) * each), 9, channels), o * each);
      return {
        x: { shape: [1, channels, side, side], values: transpose(x, pixels, channels) },
        w: { shape: [channels, channels, 3, 3], values: taps },
        bias: { shape: [channels], values: bias! },
      };
    },
  };
}

function attentionWork(tokens: number, headDim: number): Work {
  const heads = 8;
  const name = `attention ${heads}x${tokens}x${headDim}`;
  const one = attentionCase({ name, heads, headDim, queries: tokens, keys: tokens });
  return {
    ...{ name, op: 'attention', repeats: 1, heads, flops: 4 * heads * tokens * tokens * headDim, case: one },
    tensors: () => {
      const tensor = (what: string): Tensor => ({
        shape: [1, tokens, heads * headDim],
        values: valuesOf(one, what),
      });
      return { q: tensor('q'), k: tensor('k'), v: tensor('v') };
    },
  };
}

function groupNormWork(channels: number, side: number): Work {
  const tokens = side * side;
  const name = `group norm ${channels}x${side}x${side}`;
  const one = groupNormCase({ name, tokens, channels });
  return {
    ...{ name, op: 'group norm', repeats: 10, heads: 0, flops: 0, case: one, transposed: [tokens, channels] },
    tensors: () => ({
      x: { shape: [1, channels, side, side], values: transpose(valuesOf(one, 'x'), tokens, channels) },
      gamma: { shape: [channels], values: valuesOf(one, 'gamma') },
      beta: { shape: [channels], values: valuesOf(one, 'beta') },
    }),
  };
}

function unetWork(model: FullModel, size: number, images = 1): Work {
  const name = `${model} ${size}x${size}${images > 1 ? `, ${images} images` : ''}`;
  return {
    ...{ name, op: 'unet', repeats: 1, heads: 0, full: { model, size, images } },
    flops: 2 * images * arithmeticOf(size, model).base,
    tensors: () => {
      const { loras: _, control: __, ...tensors } = stepOf(images, size, model);
      return Object.fromEntries(
        Object.entries(tensors).map(([name, { dtype, shape, data }]) => [
          name,
          { shape, values: toF32(dtype, data) },
        ]),
      );
    },
  };
}

export const WORKS: readonly Work[] = [
  gemmWork(1024, 1280, 1280),
  gemmWork(4096, 320, 320, 10),
  convWork(320, 64),
  convWork(640, 32),
  convWork(1280, 16),
  attentionWork(1024, 80),
  attentionWork(4096, 40),
  groupNormWork(320, 64),
  unetWork('sd15', 16),
  unetWork('sd15', 32),
  unetWork('sdxl', 32),
];

/** Steps with classifier-free guidance: SD 1.5 at 512x512, SDXL at 1024x1024. Work for a GPU. */
export const STEPS: readonly Work[] = [unetWork('sd15', 64, 2), unetWork('sdxl', 128, 2)];

function writeTensors(path: string, tensors: Readonly<Record<string, Tensor>>): void {
  const views = Object.entries(tensors).map(([name, { shape, values }]) => ({
    ...{ name, dtype: 'F32' as const, shape },
    data: new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
  }));
  mkdirSync(PEERS, { recursive: true });
  writeFileSync(`${path}.part`, encode(views));
  renameSync(`${path}.part`, path);
}

const slug = (name: string): string => name.toLowerCase().replaceAll(/[^a-z0-9]+/g, '-');

/** The job of a work for one contender; writes the file of its tensors unless it is there. */
export function jobOf({ name, op, repeats, heads, full, tensors }: Work, contender: string): Job {
  const base = PEERS + slug(name);
  const data = `${base}.safetensors`;
  if (!existsSync(data)) writeTensors(data, tensors());
  // onnxruntime reads weights from the folder of the graph and nowhere else.
  const onnx = (times: number): string => (full ? `${FOLDER}${slug(name)}.onnx` : `${base}-${times}.onnx`);
  return {
    ...{ name, op, repeats, heads, data, ...(full ? { full } : {}) },
    onnx: onnx(repeats),
    onnxOnce: onnx(1),
    checkpoint: full ? `${FOLDER}${full.model}.safetensors` : '',
    out: `${base}.${slug(contender)}.f32`,
  };
}
