/** What weights take on the GPU, by arithmetic. Needs no driver. */
import { describe, expect, test } from 'vitest';
import { leastPanels, panelBytes, panelsPerBinding } from '../../src/kernels/panel.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { partsOf } from '../../src/unet/layers.ts';
import { isMatrix, placeOf, weightBytes } from '../../src/unet/packed.ts';
import { shapesOf } from '../fixtures/shapes/load.ts';
import { GUARANTEED } from '../gpu/capabilities.ts';

const capabilities = { ...GUARANTEED, maxBufferBytes: 2 ** 31 };

describe('the weights of a full-size UNet', () => {
  test.each([
    ['sd15', 0.59],
    ['sd21', 0.59],
    ['sdxl', 0.545],
    ['ssd-1b', 0.555],
    ['koala-1b', 0.555],
  ] as const)('of %s take %f of f16 in q8_0', (model, most) => {
    const config = detectUNet(shapesOf(model));
    const bytes = weightBytes(config, 'q8_0', capabilities);
    const ratio = bytes / weightBytes(config, 'f16', capabilities);
    console.log(`${model}: ${(bytes / 1e9).toFixed(3)} GB in q8_0, ${ratio.toFixed(4)} of f16`);
    expect(ratio).toBeLessThan(most);
    expect(ratio).toBeGreaterThan(17 / 32);
  });

  test('are 8-bit in layers of whole blocks, but for those that the residual stream passes', () => {
    const parts = partsOf(detectUNet(shapesOf('sd15'))).filter(isMatrix);
    const formats = new Map(parts.map((part) => [part.id, placeOf(part, 'q8_0').format]));
    const inside = 'input_blocks.1.1.transformer_blocks.0.';
    for (const id of [
      `${inside}attn1.to_q`,
      `${inside}attn2.to_k`,
      `${inside}ff.net.0.proj`,
      `${inside}ff.net.2`,
    ])
      expect(formats.get(id), id).toBe('q8_0');
    for (const id of ['time_embed.0', 'input_blocks.1.0.in_layers.2', 'output_blocks.0.0.emb_layers.1'])
      expect(formats.get(id), id).toBe('q8_0');
    for (const id of ['input_blocks.0.0', 'input_blocks.3.0.op', 'output_blocks.2.1.conv', 'out.2'])
      expect(formats.get(id), id).toBe('f16');
    for (const id of [
      'input_blocks.1.1.proj_in',
      'input_blocks.1.1.proj_out',
      'output_blocks.0.0.skip_connection',
    ])
      expect(formats.get(id), id).toBe('f16');
  });
});

describe('bindings of packed weights', () => {
  test('start where a binding may, and hold no more than the adapter binds', () => {
    for (const format of ['f32', 'f16', 'q8_0'] as const)
      for (let k = 32; k <= 4096; k += 32) {
        const bytes = panelBytes(k, format);
        const least = leastPanels(bytes, capabilities);
        for (const maxBindingBytes of [bytes - 4, bytes * least, bytes * (least + 1), bytes * 7]) {
          const count = panelsPerBinding(100, bytes, { ...capabilities, maxBindingBytes });
          expect((count * bytes) % 256).toBe(0);
          expect(count * bytes).toBeLessThanOrEqual(maxBindingBytes);
          expect(count > 0).toBe(maxBindingBytes >= bytes * least);
        }
        expect(panelsPerBinding(3, bytes, capabilities)).toBe(3);
      }
  });
});
