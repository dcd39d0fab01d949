/**
 * How long an engine process may take over a call before it counts as hung: for forwards by what others of the same shape took,
 * for all else, and for shapes not seen yet, a fixed time. Keeps no timers (`child-process.ts` does).
 */
import { isSoftware } from '../gpu/kernel.ts';
import { batchKey, imagesIn } from './check.ts';
import type { Batch, DeviceInfo } from './types.ts';

/** Times of forwards vary with other programs on the GPU, kernels compiled late, LoRAs loaded meanwhile. */
const FACTOR = 20;
const MAX_SHAPES = 1024;
/** On a software adapter a kernel may take minutes to compile, and any other program slows a forward. */
const LIMITS = {
  gpu: { unknownMs: 300_000, leastMs: 30_000 },
  software: { unknownMs: 3_600_000, leastMs: 300_000 },
} as const;

export class Patience {
  readonly #most: number | undefined;
  /** Model and shape -> slowest milliseconds per image. */
  readonly #slowest = new Map<string, number>();

  /** `mostMs` replaces the limit for what has not been seen yet, and bounds all others. */
  constructor(mostMs: number | undefined) {
    this.#most = mostMs;
  }

  /** Milliseconds that a call may take, or for a load the time between two signs of progress. */
  limitMs({ name }: DeviceInfo, batch: Batch | null): number {
    const preset = LIMITS[isSoftware(name) ? 'software' : 'gpu'];
    const most = this.#most ?? preset.unknownMs;
    const perImage = batch === null ? undefined : this.#slowest.get(keyOf(batch));
    if (batch === null || perImage === undefined) return most;
    return Math.min(most, Math.max(preset.leastMs, FACTOR * perImage * imagesIn(batch.requests)));
  }

  /** Remembers how long a forward took. */
  note(batch: Batch, ms: number): void {
    const key = keyOf(batch);
    const slowest = Math.max(this.#slowest.get(key) ?? 0, ms / imagesIn(batch.requests));
    if (this.#slowest.size >= MAX_SHAPES) this.#slowest.clear();
    this.#slowest.set(key, slowest);
  }
}

function keyOf({ model, requests: [first] }: Batch): string {
  return first === undefined ? model : `${model}\n${batchKey(first)}`;
}
