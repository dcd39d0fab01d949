/**
 * What a run of a plan dispatches, in order: which form of each step, and in how many parts. Encodes nothing, owns nothing.
 */
import type { Dispatch } from './kernel.ts';
import type { Compiled } from './pipeline.ts';
import type { Step } from './spec.ts';
import { type Part, partsOf, type Substitutes } from './substitutes.ts';

/** Blocks of the longest stack per slot; 0 where no image has low-rank terms. */
export type SlotBlocks = (slot: number) => number;

/** What a run decides: the blocks of each slot, and what images bind in the place of tensors of the model. */
export interface Run {
  readonly blocks?: SlotBlocks | undefined;
  readonly substitutes?: Substitutes | undefined;
}

export interface Ready {
  readonly dispatch: Dispatch;
  /** The dispatch's own, kept here because dispatches have as many hidden classes as kernels build them in. */
  readonly grid: Dispatch['grid'];
  readonly compiled: Compiled;
  readonly index: number;
  bindGroup: GPUBindGroup | undefined;
  /** Of its parts, by first image and substitutes. */
  readonly parts: Map<string, GPUBindGroup>;
}

/** Takes one dispatch of a run: as the plan has it, or a part of it. */
export type Visit = (ready: Ready, grid: readonly [number, number, number], part?: Part) => void;

interface ReadySlots {
  readonly down?: Ready;
  readonly slots: readonly ReadySlot[];
}

interface ReadyBundle {
  readonly slots: readonly number[];
  readonly tensors: readonly string[];
  readonly together: readonly Ready[];
  readonly apart: readonly ReadyStep[];
}

export type ReadyStep = ReadySlots | ReadyBundle;

interface ReadySlot {
  readonly slot: number;
  readonly base: readonly Ready[];
  readonly main: readonly Ready[];
}

export function readyStep(
  step: Step,
  take: (dispatches: readonly Dispatch[]) => readonly Ready[],
): ReadyStep {
  if (step.kind === 'always') return { slots: [{ slot: -1, base: take([step.dispatch]), main: [] }] };
  if (step.kind === 'bundle') {
    const together = take(step.together);
    return { ...step, together, apart: step.apart.map((one) => readyStep(one, take)) };
  }
  const [down] = take([step.down]);
  const slots = step.slots.map(({ slot, base, main }) => ({ slot, base: take(base), main: take(main) }));
  return { down: down!, slots };
}

export function readyOf(step: ReadyStep): readonly Ready[] {
  if ('together' in step) return [...step.together, ...step.apart.flatMap(readyOf)];
  return [...(step.down ? [step.down] : []), ...step.slots.flatMap(({ base, main }) => [...base, ...main])];
}

/** Calls `visit` for each dispatch of a step. A generator would take a quarter of the time that encoding them takes. */
export function walk(step: ReadyStep, run: Run, visit: Visit): void {
  const { blocks, substitutes } = run;
  if ('together' in step) {
    const isPlain =
      step.slots.every((slot) => (blocks?.(slot) ?? 0) === 0) &&
      !step.tensors.some((name) => substitutes?.has(name));
    if (isPlain) for (const ready of step.together) visit(ready, ready.grid);
    else for (const one of step.apart) walk(one, run, visit);
    return;
  }
  const { down, slots } = step;
  if (down && blocks) {
    let most = 0;
    for (const { slot } of slots) most += blocks(slot);
    // No image's list for all slots is longer; workgroups past the end of a shorter one leave at once.
    if (most > 0) visit(down, [most, down.grid[1], down.grid[2]]);
  }
  for (const { slot, base, main } of slots) {
    const isLow = down && blocks && blocks(slot) > 0;
    for (const ready of isLow ? main : base) visitParts(ready, substitutes, visit);
  }
}

function visitParts(ready: Ready, substitutes: Substitutes | undefined, visit: Visit): void {
  const parts = substitutes && partsOf(ready.dispatch, substitutes);
  if (!parts) {
    visit(ready, ready.grid);
    return;
  }
  const [x, y, z] = ready.grid;
  const { imageAxis } = ready.dispatch;
  for (const part of parts) {
    visit(ready, imageAxis === 1 ? [x, part.images, z] : [x, y, part.images], part);
  }
}
