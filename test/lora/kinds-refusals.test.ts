/** What is refused of adapter kinds beside LoRA, and what it says; and that nothing else is ever thrown. No GPU. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { TensorView } from '../../src/safetensors.ts';
import {
  BIASED,
  CONV1,
  CONV3,
  count,
  FF,
  failure,
  file,
  flat,
  LINEAR,
  NORM,
  parse,
  raw,
  tensor,
} from './files.ts';

const SEED = 0x5eed;

describe('an adapter of such a kind', () => {
  const lora = { 'lora_down.weight': [4, 320], 'lora_up.weight': [320, 4] };
  const hada = { hada_w1_a: [320, 4], hada_w1_b: [4, 320], hada_w2_a: [320, 4], hada_w2_b: [4, 320] };
  const glora = {
    'a1.weight': [320, 4],
    'a2.weight': [4, 320],
    'b1.weight': [320, 4],
    'b2.weight': [4, 320],
  };

  const REFUSED: readonly (readonly [
    what: string,
    tensors: readonly TensorView[],
    code: 'ERR_LORA_INVALID' | 'ERR_LORA_MISMATCH' | 'ERR_LORA_UNSUPPORTED',
    message: RegExp,
  ])[] = [
    [
      'LoHa without a factor',
      file(LINEAR, { ...hada, hada_w2_b: [] }).slice(0, 3),
      'ERR_LORA_INVALID',
      /no matching "hada_w2_b"/,
    ],
    [
      'LoHa of another width',
      file(LINEAR, { ...hada, hada_w1_b: [4, 640] }),
      'ERR_LORA_MISMATCH',
      /"hada_w1_b".*expected \[4, 320\], got \[4, 640\]/,
    ],
    [
      'LoHa with half a core',
      file(CONV3, {
        hada_w1_a: [4, 320],
        hada_w1_b: [4, 320],
        hada_w2_a: [4, 320],
        hada_w2_b: [4, 320],
        hada_t1: [4, 4, 3, 3],
      }),
      'ERR_LORA_INVALID',
      /no matching "hada_t2"/,
    ],
    [
      'LoKr that is too small',
      file(LINEAR, { lokr_w1: [4, 4], lokr_w2: [40, 40] }),
      'ERR_LORA_MISMATCH',
      /expected \[320, 320\], got \[160, 160\]/,
    ],
    [
      'LoKr with w1 twice',
      file(LINEAR, { lokr_w1: [4, 4], lokr_w1_a: [4, 2], lokr_w1_b: [2, 4], lokr_w2: [80, 80] }),
      'ERR_LORA_INVALID',
      /both .*lokr_w1 and .*lokr_w1_a/,
    ],
    ['LoKr without w1', file(LINEAR, { lokr_w2: [80, 80] }), 'ERR_LORA_INVALID', /no matching "lokr_w1"/],
    [
      'GLoRA without a common rank',
      file(FF, {
        'a1.weight': [1280, 5],
        'a2.weight': [4, 1280],
        'b1.weight': [320, 4],
        'b2.weight': [4, 1280],
      }),
      'ERR_LORA_INVALID',
      /have no rank in common/,
    ],
    [
      'GLoRA of another width',
      file(CONV3, { ...glora, 'b2.weight': [4, 320, 1, 1] }),
      'ERR_LORA_MISMATCH',
      /"b2".*expected \[4, 2880\]/,
    ],
    [
      'OFT of other rows',
      file(LINEAR, { oft_blocks: [30, 8, 8] }),
      'ERR_LORA_MISMATCH',
      /"oft_blocks".*expected \[40, 8, 8\], got \[30, 8, 8\]/,
    ],
    [
      'OFT that is not square',
      file(LINEAR, { oft_blocks: [40, 8, 4] }),
      'ERR_LORA_INVALID',
      /not \[n, b, b\]/,
    ],
    ['a rescale alone', file(LINEAR, { rescale: [320, 1] }), 'ERR_LORA_INVALID', /no matching "oft_blocks"/],
    [
      'a dora_scale of one dimension',
      file(LINEAR, { ...lora, dora_scale: [320] }),
      'ERR_LORA_MISMATCH',
      /"dora_scale".*expected \[320, 1\], got \[320\]/,
    ],
    [
      'a dora_scale of a linear layer on a convolution',
      file(CONV1, {
        'lora_down.weight': [4, 320, 1, 1],
        'lora_up.weight': [320, 4, 1, 1],
        dora_scale: [320, 1],
      }),
      'ERR_LORA_MISMATCH',
      /expected \[320, 1, 1, 1\]/,
    ],
    [
      'a dora_scale beside a difference',
      file(LINEAR, { diff: [320, 320], dora_scale: [320, 1] }),
      'ERR_LORA_UNSUPPORTED',
      /dora_scale for .*ComfyUI has none beside/,
    ],
    [
      'a difference of another shape',
      file(CONV1, { diff: [320, 320] }),
      'ERR_LORA_MISMATCH',
      /"diff".*expected \[320, 320, 1, 1\], got \[320, 320\]/,
    ],
    ['a b_norm without w_norm', file(NORM, { b_norm: [320] }), 'ERR_LORA_INVALID', /no matching "w_norm"/],
    [
      'two kinds on a weight',
      file(LINEAR, { ...lora, diff: [320, 320] }),
      'ERR_LORA_INVALID',
      /both .*(?:lora_down\.weight and .*diff|diff and .*lora_down\.weight) change the same tensor, as (?:LoRA and as full difference|full difference and as LoRA)/,
    ],
    [
      'two differences of a weight',
      file(NORM, { diff: [320], w_norm: [320] }),
      'ERR_LORA_INVALID',
      /both .*diff and .*w_norm/,
    ],
    [
      'a padded weight',
      [...file(LINEAR, lora), raw(`${flat(LINEAR)}.reshape_weight`, 'I32', [2], [64, 1, 0, 0, 128, 2, 0, 0])],
      'ERR_LORA_UNSUPPORTED',
      /reshape_weight.*pads the weight from \[320, 320\] to \[320, 640\]/,
    ],
  ];

  it.each(REFUSED)('is refused: %s', async (_, tensors, code, message) => {
    const error = await failure(tensors);
    expect(error.message).toMatch(message);
    expect(error.message).toContain('pixel');
    expect(error.code).toBe(code);
  });

  it('never fails with anything but an UnetdError, whatever is done to its shapes', async () => {
    const conv = { hada_w1_a: [4, 320], hada_w1_b: [3, 320], hada_w2_a: [4, 320], hada_w2_b: [5, 320] };
    const cores = { hada_t1: [4, 3, 3, 3], hada_t2: [4, 5, 3, 3], dora_scale: [1, 320, 1, 1] };
    const good: readonly (readonly [string, Readonly<Record<string, readonly number[]>>])[] = [
      [LINEAR, { ...lora, dora_scale: [320, 1] }],
      [LINEAR, { ...hada, dora_scale: [1, 320] }],
      [CONV3, { ...conv, ...cores }],
      [LINEAR, { lokr_w1_a: [4, 2], lokr_w1_b: [2, 4], lokr_w2_a: [80, 3], lokr_w2_b: [3, 80] }],
      [CONV3, { lokr_w1: [8, 8], lokr_w2_a: [3, 40], lokr_w2_b: [2, 40], lokr_t2: [3, 2, 3, 3] }],
      [CONV1, { lokr_w1: [8, 8], lokr_w2: [40, 40, 1, 1] }],
      [LINEAR, glora],
      [FF, { 'a1.weight': [4, 1280], 'a2.weight': [1280, 4], 'b1.weight': [4, 1280], 'b2.weight': [320, 4] }],
      [LINEAR, { oft_blocks: [40, 8, 8], rescale: [320, 1] }],
      [LINEAR, { oft_blocks: [2, 40, 8, 8], rescale: [320, 1], alpha: [] }],
      [BIASED, { diff: [320, 320], diff_b: [320] }],
      [NORM, { w_norm: [320], b_norm: [320] }],
      [BIASED, { ...lora, 'lora_B.bias': [320] }],
    ];
    const change = fc.record({
      part: fc.nat(),
      axis: fc.nat(),
      how: fc.constantFrom('keep', 'resize', 'drop', 'lengthen', 'shorten', 'swap'),
      size: fc.constantFrom(0, 1, 2, 3, 8, 40, 320),
    });
    const counted = { taken: 0, refused: 0 };
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(...good),
        fc.array(change, { maxLength: 2 }),
        async ([id, shapes], changes) => {
          const parts = new Map(Object.entries(shapes).map(([part, shape]) => [part, [...shape]]));
          for (const { part, axis, how, size } of changes) {
            const name = [...parts.keys()][part % parts.size]!;
            const shape = parts.get(name)!;
            const at = axis % Math.max(1, shape.length);
            if (how === 'drop' && parts.size > 1) parts.delete(name);
            else if (how === 'resize' && shape.length > 0) shape[at] = size;
            else if (how === 'lengthen') shape.splice(at, 0, size);
            else if (how === 'shorten') shape.splice(at, 1);
            else if (how === 'swap') shape.reverse();
          }
          if ([...parts.values()].some((shape) => count(shape) > 1_000_000)) return;
          const tensors = [...parts].map(([part, shape]) => tensor(`${flat(id)}.${part}`, shape));
          const result: unknown = await parse(tensors).catch((reason: unknown) => reason);
          counted[result instanceof Error ? 'refused' : 'taken'] += 1;
          if (result instanceof Error)
            expect(result).toMatchObject({ name: 'UnetdError', code: expect.stringMatching(/^ERR_LORA_/) });
        },
      ),
      { seed: SEED, numRuns: 400 },
    );
    // Both happen, or the changes are not what they should be.
    expect(Math.min(counted.taken, counted.refused)).toBeGreaterThan(50);
  });
});
