/**
 * What some images of a run bind in the place of a tensor of the model, and how a dispatch is cut into parts for it. Pure;
 * who makes the substitutes, and of what, is no business of a plan.
 */
import type { Dispatch } from './kernel.ts';

export interface Substitute {
  /** Names the buffer: equal ids bind the same one, until the device's generation changes. */
  readonly id: number;
  /** As long as the tensor that it stands for, from its first byte on. */
  readonly current: () => GPUBuffer;
  /** Called before each dispatch that binds it; encodes what makes its bytes if they are not there. */
  readonly ready: (pass: GPUComputePassEncoder) => void;
}

/** Name of a tensor -> what each image binds for it; undefined where an image uses the tensor itself. */
export type Substitutes = ReadonlyMap<string, readonly (Substitute | undefined)[]>;

/** Neighbouring images that bind the same. */
export interface Part {
  readonly image0: number;
  images: number;
  /** Operand -> what stands in for it. */
  readonly substitutes: ReadonlyMap<string, Substitute>;
}

/** Undefined where the dispatch binds no tensor that is replaced for any image. */
export function partsOf(dispatch: Dispatch, substitutes: Substitutes): readonly Part[] | undefined {
  if (dispatch.imageAxis === undefined) return undefined;
  const replaced = Object.entries(dispatch.operands).flatMap(([name, operand]) => {
    const tensor = operand.kind === 'resident' ? operand.tensor : undefined;
    const byImage = tensor && substitutes.get(tensor.name);
    return byImage ? [{ name, byImage }] : [];
  });
  if (replaced.length === 0) return undefined;
  const parts: Part[] = [];
  for (let image = 0; image < dispatch.grid[dispatch.imageAxis]; image++) {
    const last = parts.at(-1);
    if (
      last &&
      replaced.every(({ name, byImage }) => last.substitutes.get(name)?.id === byImage[image]?.id)
    ) {
      last.images += 1;
      continue;
    }
    const own = replaced.flatMap(({ name, byImage }) => {
      const substitute = byImage[image];
      return substitute ? [[name, substitute] as const] : [];
    });
    parts.push({ image0: image, images: 1, substitutes: new Map(own) });
  }
  return parts;
}
