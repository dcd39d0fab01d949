/** LoRA stacks of a batch in the layout of shaders/gemm/lora_blocks.wgsl: table and pool. Test data, no GPU. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { RANK_BLOCK } from '../../src/kernels/gemm.ts';
import { PANEL } from '../../src/kernels/panel.ts';
import { random, stored } from './case.ts';
import { panelsOf } from './gemm_reference.ts';

export interface LoraShape {
  readonly rank: number;
  readonly scale: number;
}

export interface Stack {
  readonly scale: number;
  readonly rank: number;
  /** [rank, k]. */
  readonly down: Float32Array;
  /** [n, rank]. */
  readonly up: Float32Array;
}

/** The adapters of each image at one layer. */
export type Stacks<T> = readonly (readonly T[])[];

export interface LoraData {
  /** Of each layer that reads the same tensor. */
  readonly layers: readonly Stacks<Stack>[];
  /** Values of down and up blocks; table offsets count quads of it. */
  readonly pool: Float32Array;
  /** Rows of four words. */
  readonly table: Uint32Array;
  /** Blocks of the image that has most of them, all layers together. */
  readonly longest: number;
  /** Blocks of all images: T is [totalBlocks][m][8]. */
  readonly totalBlocks: number;
}

const bitsOf = (value: number): number => new Uint32Array(new Float32Array([value]).buffer)[0]!;

/** Rows `first ..` of `matrix` [rows, columns], as many as a block has, zero padded. */
function sliceRows(matrix: Float32Array, columns: number, first: number): Float32Array {
  const out = new Float32Array(RANK_BLOCK * columns);
  out.set(matrix.subarray(first * columns, (first + RANK_BLOCK) * columns));
  return out;
}

/** [rows, columns] -> [columns, rows]. */
function transposed(matrix: Float32Array, rows: number, columns: number): Float32Array {
  return Float32Array.from(
    { length: rows * columns },
    (_, i) => matrix[(i % rows) * columns + Math.floor(i / rows)]!,
  );
}

/**
 * `shapes` holds the stacks of each layer that reads the tensor, the layers being the slots `slot ..`. Heads of other slots
 * stand before theirs in the table, to prove the offset.
 */
export function loraData(
  name: string,
  shapes: readonly Stacks<LoraShape>[],
  { k, n, slot }: { k: number; n: number; slot: number },
  storage: Storage,
): LoraData {
  const images = shapes[0]!.length;
  const heads = new Uint32Array((slot + shapes.length) * images * 4);
  const rows: number[] = [];
  const chunks: Float32Array[] = [];
  let quads = 0;
  let t = 0;
  const put = (values: Float32Array): number => {
    const at = quads;
    chunks.push(values);
    quads += values.length / 4;
    return at;
  };
  const addStack = (label: string, { rank, scale }: LoraShape): Stack => {
    const down = stored(random(`${label} down`, rank * k), storage);
    const up = stored(random(`${label} up`, n * rank, -0.3, 0.3), storage);
    const upRows = transposed(up, n, rank);
    for (let r = 0; r < rank; r += RANK_BLOCK) {
      const downAt = put(panelsOf(sliceRows(down, k, r), RANK_BLOCK, k, RANK_BLOCK));
      const columns = transposed(sliceRows(upRows, n, r), RANK_BLOCK, n);
      rows.push(downAt, put(panelsOf(columns, n, RANK_BLOCK, PANEL)), bitsOf(scale), t++);
    }
    return { scale: Math.fround(scale), rank, down, up };
  };
  const layers = shapes.map((): (readonly Stack[])[] => []);
  const next = (): number => (heads.length + rows.length) / 4;
  let longest = 0;
  for (let image = 0; image < images; image++) {
    const first = next();
    shapes.forEach((stacks, layer) => {
      const own = next();
      layers[layer]!.push(stacks[image]!.map((one, i) => addStack(`${name} ${layer} ${image} ${i}`, one)));
      heads.set([own, next() - own], ((slot + layer) * images + image) * 4);
    });
    heads.set([first, next() - first], (slot * images + image) * 4 + 2);
    longest = Math.max(longest, next() - first);
  }
  const pool = new Float32Array(quads * 4);
  let at = 0;
  for (const chunk of chunks) {
    pool.set(chunk, at);
    at += chunk.length;
  }
  return { layers, pool, table: Uint32Array.from([...heads, ...rows]), longest, totalBlocks: t };
}
