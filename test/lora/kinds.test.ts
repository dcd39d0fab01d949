/**
 * Kinds of adapters beside LoRA: what becomes low rank and what a patch, and properties that need no reference.
 * Numbers against ComfyUI are in test/engine/kinds.test.ts. No GPU.
 */
import { describe, expect, it } from 'vitest';
import { fromF32, toF32 } from '../../src/half.ts';
import type { AdapterPatch, PatchArray } from '../../src/lora/change.ts';
import type { TensorView } from '../../src/safetensors.ts';
import { BIASED, CONV3, FF, failure, file, flat, LINEAR, NORM, pair, parse, raw, tensor } from './files.ts';

const alpha = (id: string, value: number): TensorView => ({
  ...tensor(`${flat(id)}.alpha`, []),
  data: fromF32('F32', Float32Array.of(value)),
});

const valuesOf = (array: PatchArray | undefined): Float32Array => {
  if (array?.kind !== 'values') throw new Error('no values');
  return toF32(array.dtype, array.bytes);
};

async function onlyPatch(tensors: readonly TensorView[]): Promise<AdapterPatch> {
  const { layers, patches } = await parse(tensors);
  expect(layers).toEqual([]);
  expect(patches).toHaveLength(1);
  return patches[0]!;
}

describe('what becomes low rank', () => {
  it('is a LoHa while the product of its ranks is at most 64, and a patch past that or with a dora_scale', async () => {
    const loha = (rank: number, more: Readonly<Record<string, readonly number[]>> = {}) =>
      file(LINEAR, {
        hada_w1_a: [320, rank],
        hada_w1_b: [rank, 320],
        hada_w2_a: [320, rank],
        hada_w2_b: [rank, 320],
        ...more,
      });
    const small = await parse([...loha(8), alpha(LINEAR, 4)]);
    expect(small).toMatchObject({ layers: [{ layer: LINEAR, rank: 64, scale: 0.5 }], patches: [] });
    expect(small.rank).toBe(64);
    expect(await onlyPatch(loha(9))).toMatchObject({ rule: 'Hadamard', scale: 1, rank: 9 });
    const dora = await onlyPatch(loha(2, { dora_scale: [320, 1] }));
    expect(dora).toMatchObject({ rule: 'Hadamard', axis: 'output' });
  });

  it('is a LoKr with a factored w2 while the rank is at most 64, and a patch otherwise', async () => {
    const lokr = (rank: number) =>
      file(LINEAR, { lokr_w1: [8, 8], lokr_w2_a: [40, rank], lokr_w2_b: [rank, 40] });
    expect((await parse(lokr(8))).layers).toMatchObject([{ rank: 64 }]);
    expect(await onlyPatch(lokr(9))).toMatchObject({ rule: 'Kronecker', sizes: { rows: 40, columns: 40 } });
    const whole = file(LINEAR, { lokr_w1: [8, 8], lokr_w2: [40, 40] });
    expect(await onlyPatch([...whole, alpha(LINEAR, 3)])).toMatchObject({ rule: 'Kronecker', scale: 1 });
    const both = file(LINEAR, {
      lokr_w1_a: [8, 3],
      lokr_w1_b: [3, 8],
      lokr_w2_a: [40, 4],
      lokr_w2_b: [4, 40],
    });
    expect((await parse([...both, alpha(LINEAR, 6)])).layers).toMatchObject([{ rank: 12, scale: 1.5 }]);
  });

  it('gives the Kronecker product, whichever side of w1 is the smaller', async () => {
    const sizes = [
      [LINEAR, [2, 4], 320, 320],
      [FF, [4, 2], 320, 1280],
    ] as const;
    for (const [id, [rows, columns], outs, ins] of sizes) {
      const tensors = file(id, {
        lokr_w1: [rows, columns],
        lokr_w2_a: [outs / rows, 3],
        lokr_w2_b: [3, ins / columns],
      });
      const [w1, a, b] = tensors.map(({ data }) => toF32('F32', data)) as [
        Float32Array,
        Float32Array,
        Float32Array,
      ];
      const { layers } = await parse(tensors);
      const { rank, up, down } = layers[0]!;
      expect(rank).toBe(3 * Math.min(rows, columns));
      for (let o = 0; o < outs; o += 37)
        for (let k = 0; k < ins; k += 41) {
          let got = 0;
          for (let r = 0; r < rank; r++) got += up[o * rank + r]! * down[r * ins + k]!;
          const [r2, c2] = [outs / rows, ins / columns];
          let w2 = 0;
          for (let r = 0; r < 3; r++) w2 += a[(o % r2) * 3 + r]! * b[r * c2 + (k % c2)]!;
          expect(got).toBeCloseTo(w1[Math.floor(o / r2) * columns + Math.floor(k / c2)]! * w2, 4);
        }
    }
  });
});

describe('rotations', () => {
  const size = 8;
  const oft = (value?: number) => [
    ...file(LINEAR, { oft_blocks: [40, size, size] }),
    ...(value === undefined ? [] : [alpha(LINEAR, value)]),
  ];

  it('are orthogonal, whatever the blocks', async () => {
    for (const tensors of [oft(), oft(2)]) {
      const r = valuesOf((await onlyPatch(tensors)).arrays.rotations);
      for (let block = 0; block < 40; block++)
        for (let i = 0; i < size; i++)
          for (let j = 0; j < size; j++) {
            let dot = 0;
            for (let k = 0; k < size; k++)
              dot += r[(block * size + i) * size + k]! * r[(block * size + j) * size + k]!;
            expect(dot).toBeCloseTo(i === j ? 1 : 0, 5);
          }
    }
  });

  it('of a small alpha are close to the identity', async () => {
    const r = valuesOf((await onlyPatch(oft(1e-3))).arrays.rotations);
    const off = r.map((value, at) => value - ((at % (size * size)) % (size + 1) === 0 ? 1 : 0));
    // R - I is about 2 Q, whose norm alpha bounds.
    expect(Math.hypot(...off)).toBeCloseTo(2e-3, 6);
  });

  it('with four dimensions are a butterfly, which needs an alpha', async () => {
    const boft = file(LINEAR, { oft_blocks: [3, 40, size, size], rescale: [320, 1] });
    expect((await failure(boft)).message).toContain('a BOFT needs an alpha');
    const patch = await onlyPatch([...boft, alpha(LINEAR, 0)]);
    expect(patch).toMatchObject({ rule: 'rotation', sizes: { stages: 3, size, isButterfly: 1 } });
    expect(Object.keys(patch.arrays).sort()).toEqual(['rescale', 'rotations']);
    const deep = file(LINEAR, { oft_blocks: [8, 40, size, size] });
    expect((await failure([...deep, alpha(LINEAR, 0)])).message).toContain('do not divide the 320 rows');
  });
});

describe('differences and replacements', () => {
  it('stay in the dtype of the file where it has 16 bits', async () => {
    for (const dtype of ['F32', 'F16', 'BF16'] as const) {
      const diff = tensor(`${flat(CONV3)}.diff`, [320, 320, 3, 3], 1, dtype);
      const { delta } = (await onlyPatch([diff])).arrays;
      if (delta?.kind !== 'values') throw new Error('no values');
      expect(delta.dtype).toBe(dtype);
      expect(Buffer.compare(delta.bytes, diff.data)).toBe(0);
    }
    const f64 = raw(`${flat(BIASED)}.diff_b`, 'F64', [320], new Array(320 * 8).fill(0));
    expect(await onlyPatch([f64])).toMatchObject({
      tensor: `${BIASED}.bias`,
      arrays: { delta: { dtype: 'F32' } },
    });
  });

  it('of norms, biases and weights are patches of those tensors', async () => {
    const adapter = await parse([
      ...file(NORM, { w_norm: [320], b_norm: [320] }),
      ...file(BIASED, { diff: [320, 320], diff_b: [320] }),
      tensor('diffusion_model.out.2.bias.set_weight', [4]),
      tensor('diffusion_model.out.2.set_weight', [4, 320, 3, 3]),
    ]);
    expect(new Map(adapter.patches.map(({ tensor: name, rule }) => [name, rule]))).toEqual(
      new Map([
        [`${NORM}.weight`, 'difference'],
        [`${NORM}.bias`, 'difference'],
        [`${BIASED}.weight`, 'difference'],
        [`${BIASED}.bias`, 'difference'],
        ['out.2.bias', 'replacement'],
        ['out.2.weight', 'replacement'],
      ]),
    );
    expect(adapter).toMatchObject({ rank: 0, layers: [], unmatched: [] });
  });

  it('of the bias that PEFT gives the up projection are scaled as the matrices are', async () => {
    const stem = 'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0';
    const tensors = [
      tensor(`${stem}.lora_A.weight`, [4, 320]),
      tensor(`${stem}.lora_B.weight`, [320, 4]),
      tensor(`${stem}.lora_B.bias`, [320]),
      { ...alpha(LINEAR, 3), name: `${stem}.alpha` },
    ];
    const adapter = await parse(tensors);
    expect(adapter.layers).toMatchObject([{ layer: BIASED, rank: 4, scale: 0.75 }]);
    expect(adapter.patches).toMatchObject([{ tensor: `${BIASED}.bias`, rule: 'difference', scale: 0.75 }]);
    expect(adapter.matched).toHaveLength(4);
    const without = `${stem.replace('to_out.0', 'to_q')}`;
    const refused = tensors.map((one) => ({ ...one, name: one.name.replace(stem, without) }));
    expect((await failure(refused)).message).toContain('lora_B.bias for ');
    expect((await failure(refused)).message).toContain('the layer has no bias');
  });
});

describe('keys of text encoders', () => {
  it('are told apart among the unmatched', async () => {
    const text = [
      'lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight',
      'lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a',
      'text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight',
    ].map((name) => tensor(name, [2, 768]));
    const odd = tensor('lora_unet_nothing.lora_down.weight', [2, 768]);
    const adapter = await parse([...pair(LINEAR, [4, 320], [320, 4]), odd, ...text]);
    const names = text.map(({ name }) => name).sort();
    expect([...adapter.textEncoder].sort()).toEqual(names);
    expect([...adapter.unmatched].sort()).toEqual([odd.name, ...names].sort());
  });
});
