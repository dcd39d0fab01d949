/** Cases of `lora_down` alone: its T against f64, over every way of finding rows. With `gemm` it runs in gemm.cases.ts. */
import type { Storage } from '../../src/gpu/kernel.ts';
import { loraDown, loraDownOf, RANK_BLOCK } from '../../src/kernels/gemm.ts';
import { type Built, type Case, storagesOf, tolerance } from './case.ts';
import { gemmArgs, gemmData, gemmInputs, rowsOfA } from './gemm.cases.ts';
import { product } from './gemm_reference.ts';
import { GEMM_SHAPES, type GemmShape } from './gemm_shapes.ts';

/** T [block][m][8], scaled, of all images' stacks one after the other. */
function reference(shape: GemmShape, data: ReturnType<typeof gemmData>): Float64Array {
  const { m, k, lora } = data;
  const a = rowsOfA(shape, data);
  const out = new Float64Array((lora?.totalBlocks ?? 0) * m * RANK_BLOCK);
  let block = 0;
  for (let image = 0; image < data.images; image++) {
    const rows = a.subarray(image * m * k, (image + 1) * m * k);
    for (const { rank, scale, down } of lora?.layers.flatMap((stacks) => stacks[image] ?? []) ?? []) {
      const t = product(rows, down, m, rank, k);
      t.forEach((value, i) => {
        const r = i % rank;
        const at = (block + Math.floor(r / RANK_BLOCK)) * m + Math.floor(i / rank);
        out[at * RANK_BLOCK + (r % RANK_BLOCK)] = scale * value;
      });
      block += Math.ceil(rank / RANK_BLOCK);
    }
  }
  return out;
}

function build(shape: GemmShape, storage: Storage): Built {
  const data = gemmData(shape, storage);
  const { lora, m, k, images } = data;
  const { x, x2, ...inputs } = gemmInputs(shape, data);
  return {
    inputs: { x: x!, ...(x2 ? { x2 } : {}), pool: inputs.pool!, table: inputs.table! },
    outputs: {
      t: {
        as: 'f32',
        count: (lora?.totalBlocks ?? 0) * m * RANK_BLOCK,
        expected: () => reference(shape, data),
        tolerance: tolerance('f32', storage, k),
      },
    },
    bytes: data.x.length * (storage === 'f16' ? 2 : 4),
    dispatches: (operands, capabilities, variant) => {
      // `w` and `out` are no operands of this kernel.
      const args = gemmArgs(shape, { images, m }, { ...operands, w: operands.x!, out: operands.x! }, storage);
      const { pool, table, t } = operands;
      const where = { slot: 2, pool: pool!, table: table!, t: t! };
      const down = loraDownOf(args, capabilities, where, variant);
      return [{ ...down, grid: [lora?.longest ?? 0, down.grid[1], down.grid[2]] }];
    },
  };
}

export const loraDownCase = (shape: GemmShape): Case => ({
  name: shape.name,
  kernel: loraDown,
  ...storagesOf(shape),
  build: (storage) => build(shape, storage),
});

export const CASES: readonly Case[] = GEMM_SHAPES.filter((shape) =>
  shape.lora?.some((stack) => stack.length > 0),
).map(loraDownCase);
