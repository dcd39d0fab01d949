/**
 * What a plan is made of: steps, and where their tensors lie in the arena. Arithmetic and checks; nothing is compiled or run.
 */
import { UnetdError } from '../errors.ts';
import { place } from './arena.ts';
import type { Device } from './device.ts';
import type { Dispatch, Storage, Virtual } from './kernel.ts';

export type Step =
  | { readonly kind: 'always'; readonly dispatch: Dispatch }
  /**
   * Layers that read one tensor. Of each slot `base` runs when no image has low-rank terms for it, else `main`; `down` runs
   * before them when any of the slots has terms.
   */
  | { readonly kind: 'slots'; readonly down: Dispatch; readonly slots: readonly Slot[] }
  /**
   * `together` runs when no slot has low-rank terms and none of `tensors` is replaced for any image, else the steps `apart`.
   */
  | {
      readonly kind: 'bundle';
      readonly slots: readonly number[];
      readonly tensors: readonly string[];
      readonly together: readonly Dispatch[];
      readonly apart: readonly Step[];
    };

export interface Slot {
  readonly slot: number;
  readonly base: readonly Dispatch[];
  readonly main: readonly Dispatch[];
}

export interface PlanSpec {
  readonly label: string;
  readonly storage: Storage;
  readonly steps: readonly Step[];
  /** Written before a run; alive from the first step on. */
  readonly feeds: readonly Virtual[];
  /** Read after a run; alive until the last step. */
  readonly results: readonly Virtual[];
}

export function dispatchesOf(step: Step): readonly Dispatch[] {
  if (step.kind === 'always') return [step.dispatch];
  if (step.kind === 'bundle') return [...step.together, ...step.apart.flatMap(dispatchesOf)];
  return [step.down, ...step.slots.flatMap(({ base, main }) => [...base, ...main])];
}

/** What a run without low-rank terms and substitutes dispatches. */
export function plainDispatchesOf(step: Step): readonly Dispatch[] {
  if (step.kind === 'always') return [step.dispatch];
  return step.kind === 'bundle' ? step.together : step.slots.flatMap(({ base }) => base);
}

/** Offsets of all virtual tensors, from the first step that names them to the last. */
export function layOut(
  spec: PlanSpec,
  alignment: number,
): { offsets: ReadonlyMap<number, number>; totalBytes: number; lowerBoundBytes: number } {
  const lives = new Map<number, { sizeBytes: number; first: number; last: number }>();
  const whole = (tensor: Virtual): Virtual => tensor.within?.tensor ?? tensor;
  const touch = (operand: Virtual, at: number): void => {
    const tensor = whole(operand);
    const life = lives.get(tensor.id);
    if (!life) lives.set(tensor.id, { sizeBytes: tensor.sizeBytes, first: at, last: at });
    else life.last = Math.max(life.last, at);
  };
  for (const feed of spec.feeds) touch(feed, 0);
  spec.steps.forEach((step, at) => {
    for (const dispatch of dispatchesOf(step))
      for (const operand of Object.values(dispatch.operands))
        if (operand.kind === 'virtual') touch(operand, at);
  });
  for (const result of spec.results) touch(result, spec.steps.length);
  const placement = place([...lives.values()], alignment);
  const offsets = new Map([...lives.keys()].map((id, i) => [id, placement.offsets[i] ?? 0]));
  return { offsets, totalBytes: placement.totalBytes, lowerBoundBytes: placement.lowerBoundBytes };
}

export function checkLimits(device: Device, spec: PlanSpec, dispatch: Dispatch): void {
  const limit = device.capabilities.maxBindingBytes;
  for (const [name, operand] of Object.entries(dispatch.operands))
    if (operand.sizeBytes > limit)
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `${spec.label}: "${name}" of ${dispatch.label} needs ${operand.sizeBytes} bytes, the adapter binds at most ${limit}; use a smaller batch or latent`,
        { needed: operand.sizeBytes, limit },
      );
  const names = new Map<number, string>();
  for (const [name, operand] of Object.entries(dispatch.operands)) {
    if (operand.kind !== 'virtual') continue;
    const other = names.get(operand.id);
    // WebGPU refuses writable bindings that alias, and all of the arena is bound writable.
    if (other)
      throw new Error(`${dispatch.label}: "${other}" and "${name}" are the same tensor ${operand.label}`);
    names.set(operand.id, name);
  }
  const most = device.gpu.limits.maxComputeWorkgroupsPerDimension;
  if (dispatch.grid.some((n) => n > most))
    throw new UnetdError(
      'ERR_TOO_LARGE',
      `${spec.label}: ${dispatch.label} needs a grid of ${dispatch.grid}, the adapter allows ${most} a side; use a smaller batch or latent`,
    );
}
