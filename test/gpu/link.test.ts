/** What `link` makes of kernels, and that compile errors name the WGSL file and line. Needs no driver. */
import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/gpu/device.ts';
import { defineKernel } from '../../src/gpu/kernel.ts';
import { link, type Recipe, recipeKey } from '../../src/gpu/link.ts';
import { geglu } from '../../src/kernels/elementwise.ts';
import { gemm } from '../../src/kernels/gemm.ts';

const device = await Device.open({ backend: 'null' });
afterAll(() => device.close());

const gegluRecipe: Recipe = {
  kernel: geglu,
  variant: 'plain',
  choices: {},
  constants: {},
  operandNames: ['x', 'out'],
  wide: [],
};

const gemmRecipe: Recipe = {
  kernel: gemm,
  variant: 'tile',
  choices: { a: 'linear', lora: 'none', w: 'quads' },
  constants: {},
  operandNames: ['out', 'w', 'x'],
  wide: [],
};

const lines = (file: string): string[] =>
  readFileSync(new URL(`../../shaders/${file}`, import.meta.url), 'utf8').split('\n');

describe('link', () => {
  test('maps every line of a module back to the file it came from', () => {
    const { code, origin } = link(gemmRecipe, 'f16');
    let mapped = 0;
    code.split('\n').forEach((text, i) => {
      const [file, line] = origin(i + 1).split(':');
      if (file === 'header') return;
      expect(lines(file!)[Number(line) - 1]).toBe(text);
      mapped += 1;
    });
    expect(mapped).toBeGreaterThan(80);
    expect(origin(1)).toBe('header:1');
    expect(origin(code.split('\n').length + 2)).toBe('end:2');
  });

  test('numbers the bindings by the kernel, whatever the order of the operands', () => {
    expect(link(gemmRecipe, 'f32').bound).toEqual(['x', 'w', 'out']);
  });

  test('tells absent operands from present ones', () => {
    expect(link(gemmRecipe, 'f32').code).toContain('const HAS_bias = false;');
    const biased = link({ ...gemmRecipe, operandNames: ['x', 'w', 'out', 'bias'] }, 'f32').code;
    expect(biased).toContain('const HAS_bias = true;');
  });

  test('gives equal keys to equal modules and others to others', () => {
    const key = recipeKey(gemmRecipe, 'f16');
    expect(recipeKey({ ...gemmRecipe, operandNames: ['x', 'w', 'out'] }, 'f16')).toBe(key);
    expect(recipeKey(gemmRecipe, 'f32')).not.toBe(key);
    expect(recipeKey({ ...gemmRecipe, wide: ['x'] }, 'f16')).not.toBe(key);
    expect(recipeKey({ ...gemmRecipe, constants: { SILU: true } }, 'f16')).not.toBe(key);
    expect(recipeKey({ ...gemmRecipe, operandNames: ['x', 'w', 'out', 'bias'] }, 'f16')).not.toBe(key);
  });

  test.each<[string, Partial<Recipe>, RegExp]>([
    ['an unknown variant', { variant: 'fast' }, /gemm has no variant fast/],
    ['an unknown choice', { choices: { a: 'conv5', lora: 'none' } }, /option a has no choice conv5/],
    ['a missing choice', { choices: { a: 'linear' } }, /option lora has no choice undefined/],
    ['an unknown operand', { operandNames: ['x', 'w', 'out', 'y'] }, /no operand y/],
    ['a missing operand', { operandNames: ['x', 'w'] }, /needs the operand out/],
    ['an unknown constant', { constants: { TILE: 3 } }, /no constant TILE/],
  ])('refuses %s by name', (_, change, message) => {
    expect(() => link({ ...gemmRecipe, ...change }, 'f32')).toThrow(message);
  });
});

describe('null rung: compiling', () => {
  test('an error names the file and line of the WGSL source', async () => {
    const { params, ...rest } = geglu;
    // `rows` is gone from the params, so the file's own use of it is an error there.
    const broken = defineKernel({ ...rest, name: 'broken', params: { quads: params.quads! } });
    const at = lines('elementwise/geglu.wgsl').findIndex((line) => line.includes('p.rows')) + 1;
    await expect(device.pipelines.get({ ...gegluRecipe, kernel: broken }, 'f32')).rejects.toMatchObject({
      code: 'ERR_GPU',
      message: expect.stringContaining(`elementwise/geglu.wgsl:${at}:`),
    });
    device.check();
  });

  test('equal recipes share a pipeline', async () => {
    const first = await device.pipelines.get(gegluRecipe, 'f32');
    expect(await device.pipelines.get({ ...gegluRecipe, operandNames: ['out', 'x'] }, 'f32')).toBe(first);
  });
});
