/**
 * Compares two ways to run something on a machine that does other things too: they run in turns, each pair gives a ratio, and
 * the median of the ratios counts. Knows no engine.
 */
import { driverCpuMs, median, quantile } from './measure.ts';

/** One run: time on the GPU, and processor time of a software driver's threads (undefined where it cannot be told). */
export interface Sample {
  readonly gpuMs: number;
  readonly coreMs: number | undefined;
}

/** A ratio of times, `b` to `a`, with the quartiles of the pairs. */
export interface Ratio {
  readonly median: number;
  readonly low: number;
  readonly high: number;
}

export interface Pairs {
  readonly gpu: Ratio;
  readonly core: Ratio | undefined;
  /** Medians of the runs of `a`. */
  readonly gpuMs: number;
  readonly coreMs: number | undefined;
  readonly pairs: number;
}

/** What a forward took, by its own measure of GPU time. */
export async function sample(forward: () => Promise<{ readonly gpuMs: number }>): Promise<Sample> {
  const before = driverCpuMs();
  const { gpuMs } = await forward();
  const after = driverCpuMs();
  return { gpuMs, coreMs: before === undefined || after === undefined ? undefined : after - before };
}

export function pairsOf(samples: readonly (readonly [a: Sample, b: Sample])[]): Pairs {
  const cores = samples.flatMap(([a, b]) =>
    a.coreMs !== undefined && b.coreMs !== undefined ? [[a.coreMs, b.coreMs] as const] : [],
  );
  return {
    gpu: ratioOf(samples.map(([a, b]) => b.gpuMs / a.gpuMs)),
    core: cores.length > 0 ? ratioOf(cores.map(([a, b]) => b / a)) : undefined,
    gpuMs: median(samples.map(([a]) => a.gpuMs)),
    coreMs: cores.length > 0 ? median(cores.map(([a]) => a)) : undefined,
    pairs: samples.length,
  };
}

export function ratioOf(ratios: readonly number[]): Ratio {
  const sorted = [...ratios].sort((a, b) => a - b);
  return { median: quantile(sorted, 0.5), low: quantile(sorted, 0.25), high: quantile(sorted, 0.75) };
}

/** Runs a, b, a, b ... after one of each that does not count. */
export async function inPairs(
  a: () => Promise<Sample>,
  b: () => Promise<Sample>,
  pairs: number,
): Promise<Pairs> {
  await a();
  await b();
  const samples: (readonly [Sample, Sample])[] = [];
  for (let pair = 0; pair < pairs; pair++) samples.push([await a(), await b()]);
  return pairsOf(samples);
}
