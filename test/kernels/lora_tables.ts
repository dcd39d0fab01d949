/** LoRA stacks of a batch in the layout of shaders/gemm/lora_blocks.wgsl: table and pool. Test data, no GPU. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { PANEL, RANK_BLOCK } from '../../src/kernels/gemm.ts';
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

export interface LoraData {
  /** The adapters of every image. */
  readonly stacks: readonly (readonly Stack[])[];
  /** Values of down and up blocks; table offsets count quads of it. */
  readonly pool: Float32Array;
  /** Rows of four words. */
  readonly table: Uint32Array;
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

/** `slot` rows of other slots stand before this one's in the table, to prove the offset. */
export function loraData(
  name: string,
  shapes: readonly (readonly LoraShape[])[],
  { k, n, slot }: { k: number; n: number; slot: number },
  storage: Storage,
): LoraData {
  const headRows = (slot + 1) * shapes.length;
  const table: number[] = Array.from({ length: headRows * 4 }, () => 0);
  const chunks: Float32Array[] = [];
  let quads = 0;
  const put = (values: Float32Array): number => {
    const at = quads;
    chunks.push(values);
    quads += values.length / 4;
    return at;
  };
  let totalBlocks = 0;
  const stacks = shapes.map((adapters, image) => {
    const firstBlock = table.length / 4;
    const list = adapters.map(({ rank, scale }, i): Stack => {
      const down = stored(random(`${name} down ${image} ${i}`, rank * k), storage);
      const up = stored(random(`${name} up ${image} ${i}`, n * rank, -0.3, 0.3), storage);
      const upRows = transposed(up, n, rank);
      for (let r = 0; r < rank; r += RANK_BLOCK) {
        const downAt = put(panelsOf(sliceRows(down, k, r), RANK_BLOCK, k, RANK_BLOCK));
        const columns = transposed(sliceRows(upRows, n, r), RANK_BLOCK, n);
        const upAt = put(panelsOf(columns, n, RANK_BLOCK, PANEL));
        table.push(downAt, upAt, bitsOf(scale), totalBlocks++);
      }
      return { scale: Math.fround(scale), rank, down, up };
    });
    const head = (slot * shapes.length + image) * 4;
    table[head] = firstBlock;
    table[head + 1] = table.length / 4 - firstBlock;
    return list;
  });
  const pool = new Float32Array(quads * 4);
  let at = 0;
  for (const chunk of chunks) {
    pool.set(chunk, at);
    at += chunk.length;
  }
  const counts = shapes.map((adapters) =>
    adapters.reduce((sum, { rank }) => sum + Math.ceil(rank / RANK_BLOCK), 0),
  );
  return { stacks, pool, table: Uint32Array.from(table), longest: Math.max(...counts), totalBlocks };
}
