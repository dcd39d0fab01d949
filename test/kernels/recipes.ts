/** What the cases dispatch, without running it: dispatches over operands that lead nowhere, and the modules they need. */
import type { Dispatch, Operand, Storage } from '../../src/gpu/kernel.ts';
import { type Recipe, recipeKey, recipeOf } from '../../src/gpu/link.ts';
import { GUARANTEED } from '../gpu/capabilities.ts';
import type { Case } from './case.ts';
import { CASES, variantsOf } from './cases.ts';

export function dispatchesOf(one: Case, storage: Storage, variant: string): readonly Dispatch[] {
  const built = one.build(storage);
  const names = [...Object.keys(built.inputs), ...Object.keys(built.outputs)];
  const operands: Record<string, Operand> = Object.fromEntries(
    names.map((label, id) => [label, { kind: 'virtual', id, label, sizeBytes: 4 }]),
  );
  return built.dispatches(operands, GUARANTEED, variant);
}

/** Every dispatch of every case in every variant. */
export const allDispatches = (): readonly Dispatch[] =>
  CASES.flatMap((one) => variantsOf(one).flatMap((variant) => dispatchesOf(one, 'f32', variant)));

/** The distinct modules of all cases, by key. */
export function allRecipes(): ReadonlyMap<string, Recipe> {
  const recipes = allDispatches().map(recipeOf);
  return new Map(recipes.map((recipe) => [recipeKey(recipe, 'f32'), recipe]));
}
