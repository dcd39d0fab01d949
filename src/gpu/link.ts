/**
 * The only place that writes WGSL: a generated header (directives, constants, the Params struct, bindings) followed by
 * whole files from `shaders/`, and a map from lines of the module back to `file:line`. It compiles nothing.
 */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { BindingSpec, Dispatch, Kernel, MatrixShape, Storage, Unit } from './kernel.ts';

export const SHADERS: string = fileURLToPath(new URL('../../shaders/', import.meta.url));

export interface Linked {
  readonly code: string;
  /** Names of the bound operands; the index is the binding number behind the params at 0. */
  readonly bound: readonly string[];
  /** `file:line` of a 1-based line of `code`. */
  readonly origin: (line: number) => string;
}

/** The choices that make a module: everything of a dispatch but operands' places, params and grid. */
export type Recipe = Pick<Dispatch, 'kernel' | 'variant' | 'choices' | 'constants'> & {
  readonly operandNames: readonly string[];
  /** Operands that hold f32 in a plan of another storage. */
  readonly wide: readonly string[];
};

export function recipeOf(dispatch: Dispatch): Recipe {
  const { kernel, variant, choices, constants } = dispatch;
  const operandNames = Object.keys(dispatch.operands);
  const wide = operandNames.filter((name) => {
    const operand = dispatch.operands[name];
    return operand?.kind === 'virtual' && operand.wide === true;
  });
  return { kernel, variant, choices, constants, operandNames, wide };
}

/** Equal keys link to equal modules. */
export function recipeKey(recipe: Recipe, storage: Storage): string {
  const entries = (record: Readonly<Record<string, unknown>>): string =>
    Object.keys(record)
      .sort()
      .map((name) => `${name}=${record[name]}`)
      .join(',');
  const operands = recipe.operandNames
    .map((name) => (recipe.wide.includes(name) ? `${name}:f32` : name))
    .sort()
    .join(',');
  return `${recipe.kernel.name}/${recipe.variant}/${storage}/${entries(recipe.choices)}/${entries(recipe.constants)}/${operands}`;
}

export function link(recipe: Recipe, storage: Storage): Linked {
  const { kernel } = recipe;
  const variant = kernel.variants[recipe.variant];
  if (!variant) throw new Error(`kernel ${kernel.name} has no variant ${recipe.variant}`);
  const bound = Object.keys(kernel.bindings).filter((name) => recipe.operandNames.includes(name));
  for (const name of recipe.operandNames)
    if (!kernel.bindings[name]) throw new Error(`kernel ${kernel.name} has no operand ${name}`);
  const files = [
    'lib/half.wgsl',
    `lib/${storage}.wgsl`,
    ...Object.entries(kernel.options).map(([option, choices]) => {
      const file = choices[recipe.choices[option] ?? ''];
      if (!file)
        throw new Error(`kernel ${kernel.name}: option ${option} has no choice ${recipe.choices[option]}`);
      return file;
    }),
    ...variant.files,
  ];
  const parts = [{ name: 'header', lines: header(kernel, recipe, bound) }];
  for (const name of files) parts.push({ name, lines: readFileSync(SHADERS + name, 'utf8').split('\n') });
  return {
    code: parts.flatMap((part) => part.lines).join('\n'),
    bound,
    origin: (line) => {
      let rest = line;
      for (const part of parts) {
        if (rest <= part.lines.length) return `${part.name}:${rest}`;
        rest -= part.lines.length;
      }
      return `end:${rest}`;
    },
  };
}

function header(kernel: Kernel, recipe: Recipe, bound: readonly string[]): string[] {
  const variant = kernel.variants[recipe.variant];
  const lines: string[] = [];
  if (variant?.subgroupSize) {
    // Whole subgroups leave early where a tile has no rows; lanes of one subgroup always stay together.
    lines.push('enable subgroups;', 'diagnostic(off, subgroup_uniformity);');
  }
  if (variant?.matrix) lines.push(...matrixDirectives(variant.matrix));
  for (const name of Object.keys(recipe.constants))
    if (!(name in kernel.constants)) throw new Error(`kernel ${kernel.name} has no constant ${name}`);
  const matrix = variant?.matrix;
  const constants = {
    ...kernel.constants,
    ...variant?.constants,
    ...(matrix ? { MATRIX_M: matrix.m, MATRIX_N: matrix.n, MATRIX_K: matrix.k } : {}),
    ...recipe.constants,
  };
  for (const [name, value] of Object.entries(constants))
    lines.push(
      `const ${name} = ${typeof value === 'boolean' ? value : Number.isInteger(value) ? `${value}u` : value};`,
    );
  const fields = Object.entries(kernel.params).map(([name, type]) => `${name}: ${type}`);
  lines.push(`struct Params { ${fields.join(', ')} }`, '@group(0) @binding(0) var<uniform> p: Params;');
  for (const [name, spec] of Object.entries(kernel.bindings)) {
    const index = bound.indexOf(name);
    const wide = recipe.wide.includes(name);
    const unit = variant?.units?.[name] ?? 'quad';
    const type = spec.type.replace('Quad', wide ? UNITS[unit].value : UNITS[unit].stored);
    if (index >= 0) {
      lines.push(`@group(0) @binding(${index + 1}) var<storage, ${spec.access}> ${name}: ${type};`);
    } else if (spec.optional) {
      // Stands in for the absent operand so that code behind `if (HAS_name)` compiles and is dropped.
      lines.push(`var<private> ${name}: ${type.replace(/>$/, ', 1>')};`);
    } else throw new Error(`kernel ${kernel.name} needs the operand ${name}`);
    if (spec.optional) lines.push(`const HAS_${name} = ${index >= 0};`);
    if (spec.type === 'array<Quad>')
      lines.push(`const WIDE_${name} = ${wide};`, ...accessors(name, spec, unit, wide));
  }
  return lines;
}

function matrixDirectives({ input }: MatrixShape): string[] {
  return [
    'enable subgroups, chromium_experimental_subgroup_matrix;',
    ...(input === 'f16' ? ['enable f16;'] : []),
    // All that such code branches on is the same for a whole workgroup, which the analysis cannot always see.
    'diagnostic(off, chromium.subgroup_matrix_uniformity);',
  ];
}

/** By unit: what the storage packs it into and the values that it is, both aliases or types of WGSL, and the values' number. */
const UNITS = {
  pair: { stored: 'Pair', value: 'vec2f', count: '2' },
  quad: { stored: 'Quad', value: 'vec4f', count: '' },
  octet: { stored: 'Octet', value: 'array<vec4f, 2>', count: '8' },
} as const satisfies Record<Unit, object>;

/** How a binding of Quads is read and written: packed as the storage says, or f32 as it is. */
function accessors(name: string, { access }: BindingSpec, unit: Unit, wide: boolean): string[] {
  const { value, count } = UNITS[unit];
  // The parameters must not hide a binding of the same name.
  const at = `${name}[index_]`;
  const decoded = wide ? at : `dec${count}(${at})`;
  const encoded = wide ? 'value_' : `enc${count}(value_)`;
  const load = `fn load${count}_${name}(index_: u32) -> ${value} { return ${decoded}; }`;
  const save = `fn save${count}_${name}(index_: u32, value_: ${value}) { ${at} = ${encoded}; }`;
  const loadQuad = `fn load_${name}(i_: u32) -> vec4f { return vec4f(load2_${name}(2u * i_), load2_${name}(2u * i_ + 1u)); }`;
  return [load, ...(unit === 'pair' ? [loadQuad] : []), ...(access === 'read' ? [] : [save])];
}
