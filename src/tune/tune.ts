/**
 * Measures the choices of kernels inside whole forwards of a loaded model, and what they make of the forwards. Reads and
 * writes no files.
 */
import type { Engine } from '../engine/engine.ts';
import type { Measured } from '../engine/tuning.ts';
import type { Batch, StepRequest, TensorData } from '../engine/types.ts';
import type { Choices, Decision } from '../gpu/kernel.ts';
import { fromF32 } from '../half.ts';
import type { UNetConfig } from '../unet/config.ts';
import { compare, median, type Verdict } from './compare.ts';

/** A forward that is measured. */
export interface Workload {
  readonly label: string;
  readonly batch: Batch;
}

export interface Forward {
  readonly label: string;
  /** Medians, by the rules and as tuned. */
  readonly rulesMs: number;
  readonly tunedMs: number;
  /** Tuned over rules, the median of the rounds. */
  readonly ratio: number;
}

export interface Row extends Verdict {
  /** Dispatches at this point in all workloads, and their part of the time of all; undefined where dispatches cannot be timed. */
  readonly use: { readonly dispatches: number; readonly share: number } | undefined;
}

export interface Tuned {
  readonly rows: readonly Row[];
  /** All workloads together, then each. */
  readonly forwards: readonly [Forward, ...Forward[]];
  /** At every point that was measured; undefined where the rules shall choose: everywhere, if the forwards were no faster in all. */
  readonly choices: Measured;
}

export interface TuneOptions {
  readonly rounds: number;
  /** Times whole forwards even where each dispatch can be timed. */
  readonly onlyWhole?: boolean;
  readonly onProgress?: (line: string) => void;
}

const CONTEXT_TOKENS = 77;

const BY_RULES: Choices = new Map();

/** What a sampler asks for at one step: noise of size [height, width] in latent pixels, a prompt of CLIP's length. */
export function stepOf(
  { inChannels, contextDim, admChannels }: UNetConfig,
  images: number,
  [height, width]: readonly [number, number],
  loras: StepRequest['loras'],
): StepRequest {
  const noise = (...shape: readonly number[]): TensorData => {
    const count = shape.reduce((product, size) => product * size, 1);
    const values = Float32Array.from({ length: count }, () => 2 * Math.random() - 1);
    return { dtype: 'F16', shape, data: fromF32('F16', values) };
  };
  const timesteps = new Float32Array(images).fill(500);
  return {
    loras,
    x: noise(images, inChannels, height, width),
    timesteps: { dtype: 'F32', shape: [images], data: fromF32('F32', timesteps) },
    context: noise(images, CONTEXT_TOKENS, contextDim),
    ...(admChannels === null ? {} : { y: noise(images, admChannels) }),
  };
}

/** All workloads are of one model. */
export async function tune(
  engine: Engine,
  workloads: readonly [Workload, ...Workload[]],
  { rounds, onlyWhole = !engine.device.features.includes('timestamp-query'), onProgress }: TuneOptions,
): Promise<Tuned> {
  const batches = workloads.map(({ batch }) => batch);
  const { model } = workloads[0].batch;
  const decisions: Decision[] = [];
  for (const batch of batches) decisions.push(...(await engine.decisions(batch)));
  const measure = async (choices: Choices): Promise<ReadonlyMap<string, number>> => {
    await engine.choose(model, choices);
    if (!onlyWhole) return (await profileOf(engine, batches)).ms;
    const [ms] = await forwardsOf(engine, batches);
    return new Map(decisions.map(({ point }) => [point, ms]));
  };
  const onRound = (round: number): void =>
    onProgress?.(round === 0 ? 'compiling all candidates' : `round ${round} of ${rounds}`);
  const verdicts = await compare(decisions, measure, { rounds, onlyWhole, onRound });
  onProgress?.('whole forwards');
  await engine.choose(model, BY_RULES);
  const profile = onlyWhole ? undefined : await profileOf(engine, batches);
  const gains = new Map(
    verdicts.flatMap(({ point, better }) => (better ? [[point, better.choice] as const] : [])),
  );
  const forwards = await raceOf(engine, workloads, rounds, gains);
  const isFaster = forwards[0].ratio < 1;
  const choices = new Map(verdicts.map(({ point }) => [point, isFaster ? gains.get(point) : undefined]));
  return { rows: rowsOf(verdicts, profile), forwards, choices };
}

/** By their part of all time, the largest first. */
function rowsOf(verdicts: readonly Verdict[], profile: Profile | undefined): readonly Row[] {
  const rest = (profile?.totalMs ?? 0) - [...(profile?.ms.values() ?? [])].reduce((sum, ms) => sum + ms, 0);
  const totalMs = verdicts.reduce((sum, { rules }) => sum + rules.ms, rest);
  return verdicts
    .map((verdict): Row => {
      const dispatches = profile?.dispatches.get(verdict.point) ?? 0;
      return { ...verdict, use: profile && { dispatches, share: verdict.rules.ms / totalMs } };
    })
    .sort((a, b) => b.rules.ms - a.rules.ms);
}

interface Profile {
  /** Of all dispatches at a point. */
  readonly ms: ReadonlyMap<string, number>;
  readonly dispatches: ReadonlyMap<string, number>;
  /** Of these and of all others. */
  readonly totalMs: number;
}

/** All batches together, each run once. */
async function profileOf(engine: Engine, batches: readonly Batch[]): Promise<Profile> {
  const all = { ms: new Map<string, number>(), dispatches: new Map<string, number>(), totalMs: 0 };
  for (const batch of batches)
    for (const { point, ms } of await engine.profile(batch)) {
      all.totalMs += ms;
      if (point === undefined) continue;
      all.ms.set(point, (all.ms.get(point) ?? 0) + ms);
      all.dispatches.set(point, (all.dispatches.get(point) ?? 0) + 1);
    }
  return all;
}

/** Milliseconds of the forwards of all batches together, and behind them those of each. */
async function forwardsOf(
  engine: Engine,
  batches: readonly Batch[],
): Promise<readonly [number, ...number[]]> {
  const each: number[] = [];
  for (const batch of batches) each.push((await engine.forward(batch)).gpuMs);
  return [each.reduce((sum, ms) => sum + ms, 0), ...each];
}

/** Whole forwards by the rules and as tuned, in turns: first all workloads together, then each. */
async function raceOf(
  engine: Engine,
  workloads: readonly [Workload, ...Workload[]],
  rounds: number,
  choices: Choices,
): Promise<readonly [Forward, ...Forward[]]> {
  const batches = workloads.map(({ batch }) => batch);
  const runs: { readonly rules: readonly number[]; readonly tuned: readonly number[] }[] = [];
  const run = async (taken: Choices): Promise<readonly number[]> => {
    await engine.choose(workloads[0].batch.model, taken);
    return forwardsOf(engine, batches);
  };
  for (let round = 0; round < rounds; round++)
    runs.push({ rules: await run(BY_RULES), tuned: await run(choices) });
  const forwardOf = (label: string, i: number): Forward => ({
    label,
    rulesMs: median(runs.map(({ rules }) => rules[i]!)),
    tunedMs: median(runs.map(({ tuned }) => tuned[i]!)),
    ratio: median(runs.map(({ rules, tuned }) => tuned[i]! / rules[i]!)),
  });
  return [forwardOf('all', 0), ...workloads.map(({ label }, i) => forwardOf(label, i + 1))];
}
