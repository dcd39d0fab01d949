/** Parsing LoRA files: the algebra against f64 references written down separately, formats and files. No GPU. */
import { mkdtemp, rm, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { f32ToF16, fromF32, toF32 } from '../../src/half.ts';
import { type AdapterLayer, openAdapter } from '../../src/lora/adapter.ts';
import { digest, encode, type TensorView } from '../../src/safetensors.ts';
import type { Layer } from '../../src/unet/config.ts';
import { layersOf } from '../../src/unet/layers.ts';
import { CONV1, CONV3, flat, LINEAR, layer, pair, parse, raw, SD15, tensor } from './files.ts';

const SEED = 0x5eed;

/** scale * up down in the weight's own layout [out, cin, kh, kw], from the kernels' layout (kh, kw, cin). */
function delta(
  { rank, scale, down, up }: AdapterLayer,
  { inFeatures, outFeatures, kernel }: Layer,
): Float64Array {
  const taps = kernel * kernel;
  const out = new Float64Array(outFeatures * inFeatures * taps);
  for (let o = 0; o < outFeatures; o++) {
    for (let r = 0; r < rank; r++) {
      const weight = scale * up[o * rank + r]!;
      for (let c = 0; c < inFeatures; c++) {
        for (let tap = 0; tap < taps; tap++) {
          const at = (o * inFeatures + c) * taps + tap;
          out[at] = out[at]! + weight * down[(r * taps + tap) * inFeatures + c]!;
        }
      }
    }
  }
  return out;
}

/** up.flatten(1) @ down.flatten(1): the weight's layout whatever the kernel. */
function product(up: Float32Array, down: Float64Array | Float32Array, rank: number): Float64Array {
  const rows = up.length / rank;
  const columns = down.length / rank;
  const out = new Float64Array(rows * columns);
  for (let o = 0; o < rows; o++) {
    for (let r = 0; r < rank; r++) {
      for (let k = 0; k < columns; k++)
        out[o * columns + k] = out[o * columns + k]! + up[o * rank + r]! * down[r * columns + k]!;
    }
  }
  return out;
}

function expectClose(got: Float64Array, want: Float64Array): void {
  expect(got.length).toBe(want.length);
  let worst = 0;
  for (let i = 0; i < got.length; i++)
    if (Math.abs(got[i]! - want[i]!) > Math.abs(got[worst]! - want[worst]!)) worst = i;
  expect(
    Math.abs(got[worst]! - want[worst]!),
    `worst at ${worst}: ${got[worst]} for ${want[worst]}`,
  ).toBeLessThan(1e-5);
}

describe('the algebra of LoRA', () => {
  const shapes: readonly (readonly [string, string, (rank: number) => readonly [number[], number[]]])[] = [
    [
      'a linear layer',
      LINEAR,
      (r) => [
        [r, 320],
        [320, r],
      ],
    ],
    [
      'a linear layer written as a 1x1 convolution',
      LINEAR,
      (r) => [
        [r, 320, 1, 1],
        [320, r, 1, 1],
      ],
    ],
    [
      'a 1x1 convolution',
      CONV1,
      (r) => [
        [r, 320, 1, 1],
        [320, r, 1, 1],
      ],
    ],
    [
      'a 1x1 convolution written as a linear layer',
      CONV1,
      (r) => [
        [r, 320],
        [320, r],
      ],
    ],
    [
      'a 3x3 convolution with a 1x1 up',
      CONV3,
      (r) => [
        [r, 320, 3, 3],
        [320, r, 1, 1],
      ],
    ],
    [
      'a 3x3 convolution flattened to matrices',
      CONV3,
      (r) => [
        [r, 2880],
        [320, r],
      ],
    ],
    [
      'a layer with more outputs than inputs',
      'input_blocks.1.1.transformer_blocks.0.ff.net.0.proj',
      (r) => [
        [r, 320],
        [2560, r],
      ],
    ],
    [
      'a strided convolution',
      'input_blocks.3.0.op',
      (r) => [
        [r, 320, 3, 3],
        [320, r, 1, 1],
      ],
    ],
  ];

  it.each(shapes)('gives up down for %s', async (_, id, shapesAt) => {
    for (const rank of [1, 3, 8]) {
      const [down, up] = shapesAt(rank);
      const tensors = pair(id, down, up);
      const adapter = await parse(tensors);
      const [only] = adapter.layers;
      expect(only).toMatchObject({ layer: id, rank, scale: 1 });
      const [downValues, upValues] = tensors.map(({ data }) => toF32('F32', data)) as [
        Float32Array,
        Float32Array,
      ];
      expectClose(delta(only!, layer(id)), product(upValues, downValues, rank));
      expect(adapter.sizeBytes).toBe(4 * (downValues.length + upValues.length));
    }
  });

  it('folds a Tucker core into down, with ranks that differ on its two sides', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 1, max: 4 }),
        fc.integer({ min: 1, max: 4 }),
        fc.boolean(),
        async (upRank, downRank, wide) => {
          const ones = wide ? [1, 1] : [];
          const down = tensor(`${flat(CONV3)}.lora_down.weight`, [downRank, 320, ...ones], 1);
          const up = tensor(`${flat(CONV3)}.lora_up.weight`, [320, upRank, ...ones], 2);
          const mid = tensor(`${flat(CONV3)}.lora_mid.weight`, [upRank, downRank, 3, 3], 3);
          const alpha = { ...tensor(`${flat(CONV3)}.alpha`, []), data: fromF32('F32', Float32Array.of(2)) };
          const adapter = await parse([down, up, mid, alpha]);
          expect(adapter.layers[0]).toMatchObject({ rank: upRank, scale: 2 / downRank });
          // einsum('udkl,dc->uckl'), then up.
          const d = toF32('F32', down.data);
          const m = toF32('F32', mid.data);
          const folded = new Float64Array(upRank * 320 * 9);
          for (let u = 0; u < upRank; u++) {
            for (let c = 0; c < 320; c++) {
              for (let tap = 0; tap < 9; tap++) {
                let sum = 0;
                for (let i = 0; i < downRank; i++) sum += m[(u * downRank + i) * 9 + tap]! * d[i * 320 + c]!;
                folded[(u * 320 + c) * 9 + tap] = sum * (2 / downRank);
              }
            }
          }
          expectClose(
            delta(adapter.layers[0]!, layer(CONV3)),
            product(toF32('F32', up.data), folded, upRank),
          );
        },
      ),
      { seed: SEED, numRuns: 8 },
    );
  });

  it('reads f16, bf16 and f32 to the same numbers', async () => {
    const [f32, f16, bf16] = await Promise.all(
      (['F32', 'F16', 'BF16'] as const).map((dtype) =>
        parse(pair(CONV3, [4, 320, 3, 3], [320, 4, 1, 1], dtype)),
      ),
    );
    expect(f16!.layers).toEqual(f32!.layers);
    expect(bf16!.layers).toEqual(f32!.layers);
    expect(f16!.digest).not.toBe(f32!.digest);
  });

  it('divides alpha by the rank, in any dtype and as a scalar or a list of one', async () => {
    const key = `${flat(LINEAR)}.alpha`;
    const alphas: readonly TensorView[] = [
      raw(key, 'F32', [], [...fromF32('F32', Float32Array.of(6))]),
      raw(key, 'F16', [1], [...new Uint8Array(f32ToF16(Float32Array.of(6)).buffer)]),
      raw(key, 'BF16', [], [0xc0, 0x40]),
      raw(key, 'F64', [], [0, 0, 0, 0, 0, 0, 0x18, 0x40]),
      raw(key, 'F8_E4M3', [], [0x4c]),
      raw(key, 'I64', [], [6, 0, 0, 0, 0, 0, 0, 0]),
      raw(key, 'I32', [1, 1], [6, 0, 0, 0]),
      raw(key, 'U8', [], [6]),
    ];
    for (const alpha of alphas) {
      const adapter = await parse([...pair(LINEAR, [4, 320], [320, 4]), alpha]);
      expect(adapter.layers[0]!.scale, alpha.dtype).toBe(1.5);
      expect(adapter.matched).toContain(key);
    }
    const negative = await parse([...pair(LINEAR, [4, 320], [320, 4]), raw(key, 'I8', [], [0xfa])]);
    expect(negative.layers[0]!.scale).toBe(-1.5);
  });
});

describe('parseAdapter', () => {
  it('binds every layer of SD 1.5 from a whole kohya file, with text-encoder keys left over', async () => {
    const tensors: TensorView[] = [];
    for (const { id, inFeatures, outFeatures, kernel } of layersOf(SD15)) {
      const ones = kernel === 1 ? [] : [1, 1];
      tensors.push(
        ...pair(
          id,
          kernel === 1 ? [2, inFeatures] : [2, inFeatures, kernel, kernel],
          [outFeatures, 2, ...ones],
          'F16',
        ),
      );
    }
    const text = tensor('lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight', [2, 768]);
    const odd = tensor('lora_unet_nothing.lora_down.weight', [2, 768]);
    const adapter = await parse([...tensors, text, odd]);
    expect(adapter.layers.map(({ layer: id }) => id).sort()).toEqual(
      layersOf(SD15)
        .map(({ id }) => id)
        .sort(),
    );
    expect(adapter).toMatchObject({ format: 'kohya', rank: 2, digest: digest([...tensors, text, odd]) });
    expect([...adapter.matched].sort()).toEqual(tensors.map(({ name }) => name).sort());
    expect([...adapter.unmatched].sort()).toEqual([text.name, odd.name].sort());
  });

  it('takes the largest rank and names every format of a file', async () => {
    const other = 'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k';
    const peft = [tensor(`${other}.lora_A.weight`, [5, 320]), tensor(`${other}.lora_B.weight`, [320, 5])];
    const adapter = await parse([...pair(LINEAR, [4, 320], [320, 4]), ...peft]);
    expect(adapter.rank).toBe(5);
    expect(adapter.format.split('+').sort()).toEqual(['kohya', 'peft']);
  });

  it('lists an alpha without matrices as unmatched', async () => {
    const lone = raw(`${flat(CONV1)}.alpha`, 'F32', [], [0, 0, 0, 0]);
    const adapter = await parse([...pair(LINEAR, [4, 320], [320, 4]), lone]);
    expect(adapter.unmatched).toEqual([lone.name]);
    expect(adapter.layers).toHaveLength(1);
  });

  it('reads from a file as from memory, and refuses pickles unopened', async () => {
    const tensors = pair(CONV3, [4, 320, 3, 3], [320, 4, 1, 1], 'F16');
    const path = join(folder, 'style.safetensors');
    await writeFile(path, encode(tensors));
    expect(await openAdapter(path, SD15)).toEqual(await parse(tensors));
    for (const extension of ['.pt', '.ckpt', '.bin', '.PTH']) {
      const error: unknown = await openAdapter(join(folder, `absent${extension}`), SD15).catch(
        (reason: unknown) => reason,
      );
      expect(error).toMatchObject({
        code: 'ERR_LORA_UNSUPPORTED',
        message: expect.stringMatching(/pickles, which can run code/),
      });
    }
  });

  it('refuses a file that is written to while it is read', async () => {
    const path = join(folder, 'growing.safetensors');
    await writeFile(path, encode(pair(CONV3, [4, 320, 3, 3], [320, 4, 1, 1], 'F16')));
    let isReading = true;
    const reading = openAdapter(path, SD15)
      .catch((reason: unknown) => reason)
      .finally(() => {
        isReading = false;
      });
    for (let time = 1; isReading; time++) await utimes(path, time, time);
    expect(await reading).toMatchObject({
      code: 'ERR_SAFETENSORS',
      message: expect.stringMatching(/written to while it was read/),
    });
  });

  let folder = '';
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'unetd-'));
  });
  afterAll(() => rm(folder, { recursive: true }));
});
