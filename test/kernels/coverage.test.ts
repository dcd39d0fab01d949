/** Fails when a kernel, a variant, an option's choice, a constant or an optional operand has no case. Runs nothing. */
import { describe, expect, test } from 'vitest';
import type { Dispatch } from '../../src/gpu/kernel.ts';
import { KERNELS } from '../../src/kernels/index.ts';
import { PACK_DTYPES } from '../../src/kernels/pack.ts';
import { CASES } from './cases.ts';
import { allDispatches } from './recipes.ts';

/** Constants that must take these values; booleans must take both, and numbers that default to 0 must be set. */
const VALUES: Readonly<Record<string, readonly number[]>> = {
  SRC_DTYPE: Object.values(PACK_DTYPES),
  TAPS: [1, 9],
  DTYPE: Object.values(PACK_DTYPES),
};

const dispatches = allDispatches();

function missing(name: string, used: readonly Dispatch[]): string[] {
  const kernel = KERNELS.find((k) => k.name === name)!;
  const gaps: string[] = [];
  const need = (what: string, met: boolean): void => {
    if (!met) gaps.push(what);
  };
  for (const variant of Object.keys(kernel.variants))
    need(
      `variant ${variant}`,
      used.some((d) => d.variant === variant),
    );
  for (const [option, choices] of Object.entries(kernel.options))
    for (const choice of Object.keys(choices))
      for (const [variant, spec] of Object.entries(kernel.variants))
        if (spec.choices?.[option]?.includes(choice) ?? true)
          need(
            `option ${option} = ${choice} of ${variant}`,
            used.some((d) => d.variant === variant && d.choices[option] === choice),
          );
  for (const [constant, value] of Object.entries(kernel.constants)) {
    const values = VALUES[constant] ?? (typeof value === 'boolean' ? [false, true] : []);
    const takes = (wanted: unknown) => used.some((d) => (d.constants[constant] ?? value) === wanted);
    for (const wanted of values) need(`constant ${constant} = ${wanted}`, takes(wanted));
    if (value === 0)
      need(`constant ${constant}`, values.length > 0 || used.some((d) => d.constants[constant]));
  }
  for (const [operand, { optional }] of Object.entries(kernel.bindings)) {
    need(
      `operand ${operand}`,
      used.some((d) => operand in d.operands),
    );
    if (optional)
      need(
        `no operand ${operand}`,
        used.some((d) => !(operand in d.operands)),
      );
  }
  return gaps;
}

describe('the cases', () => {
  test.each(KERNELS.map((kernel) => kernel.name))('exercise every part of %s', (name) => {
    const used = dispatches.filter((d) => d.kernel.name === name);
    expect(missing(name, used)).toEqual([]);
  });

  test('have names that differ within a kernel', () => {
    const names = CASES.map((one) => `${one.kernel.name}: ${one.name}`);
    expect(names.filter((name, i) => names.indexOf(name) !== i)).toEqual([]);
  });

  test('belong to kernels of the registry', () => {
    expect(CASES.filter((one) => !KERNELS.includes(one.kernel))).toEqual([]);
    expect(dispatches.filter((d) => !KERNELS.includes(d.kernel))).toEqual([]);
  });
});
