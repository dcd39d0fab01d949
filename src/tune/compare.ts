/**
 * Compares the candidates of choices by times that it is given, and says which to keep. Times nothing itself, knows neither
 * kernels nor models.
 */
import type { Choice, Choices, Decision } from '../gpu/kernel.ts';

/** Runs what there is to run with these choices, and by the rules at all other points: milliseconds by point, of all points. */
export type Measure = (choices: Choices) => Promise<ReadonlyMap<string, number>>;

export interface CompareOptions {
  /** Measurements of each candidate that count. */
  readonly rounds: number;
  /** Whether times are of all that runs: then one candidate of one point is measured at a time, else those of all points at once. */
  readonly onlyWhole: boolean;
  readonly onRound?: (round: number) => void;
}

export interface Timed {
  readonly choice: Choice;
  /** Median of the rounds. */
  readonly ms: number;
}

export interface Verdict {
  readonly point: string;
  readonly rules: Timed;
  /** The fastest of the others, where it was faster than the rules by more than noise. */
  readonly better: Timed | undefined;
}

/** What a candidate must gain, in three rounds of four: less may be noise. */
const MARGIN = 0.03;
/** A candidate that takes this many times as long as the fastest is not measured again. */
const HOPELESS = 2;

/** A candidate with its times, one a round. */
interface Runner {
  readonly choice: Choice;
  readonly isRules: boolean;
  readonly ms: number[];
}

/** The candidates of a point that are still measured, first the rules'. */
interface Race {
  readonly point: string;
  readonly runners: readonly Runner[];
}

type Trial = readonly { readonly point: string; readonly runner: Runner }[];

/** Uses at one point may differ in what the rules say: theirs is no choice that is asked for. */
const choicesOf = (trial: Trial): Choices =>
  new Map(trial.flatMap(({ point, runner }) => (runner.isRules ? [] : [[point, runner.choice] as const])));

/** What is measured in one run: the i-th candidates of all points, or one candidate of one point beside the rules'. */
function trialsOf(races: readonly Race[], onlyWhole: boolean): readonly Trial[] {
  const nth = (i: number): Trial =>
    races.flatMap(({ point, runners }) => (runners[i] ? [{ point, runner: runners[i] }] : []));
  if (onlyWhole)
    return [
      nth(0),
      ...races.flatMap(({ point, runners }) => runners.slice(1).map((runner) => [{ point, runner }])),
    ];
  const most = Math.max(0, ...races.map(({ runners }) => runners.length));
  return Array.from({ length: most }, (_, i) => nth(i));
}

function withoutHopeless({ point, runners }: Race): Race {
  const fastest = Math.min(...runners.map(({ ms }) => ms.at(-1) ?? Number.POSITIVE_INFINITY));
  const [rules, ...others] = runners;
  return { point, runners: [rules!, ...others.filter(({ ms }) => ms.at(-1)! <= fastest * HOPELESS)] };
}

function quantile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.ceil(share * (sorted.length - 1))] ?? Number.NaN;
}

export const median = (values: readonly number[]): number => quantile(values, 0.5);

/** Rounds are compared one by one: what else the machine does changes less within a round than between them. */
function verdictOf({ point, runners }: Race): Verdict {
  const [rules, ...others] = runners as readonly [Runner, ...Runner[]];
  const faster = others
    .map((runner) => ({ runner, ratios: runner.ms.map((ms, round) => ms / rules.ms[round]!) }))
    .filter(({ ratios }) => quantile(ratios, 0.75) < 1 - MARGIN)
    .sort((a, b) => median(a.ratios) - median(b.ratios));
  const timed = ({ choice, ms }: Runner): Timed => ({ choice, ms: median(ms) });
  return { point, rules: timed(rules), better: faster[0] && timed(faster[0].runner) };
}

/** In turns, round after round. Points that are in no run have no verdict. */
export async function compare(
  decisions: readonly Decision[],
  measure: Measure,
  { rounds, onlyWhole, onRound }: CompareOptions,
): Promise<readonly Verdict[]> {
  const points = new Map(decisions.map(({ point, candidates }) => [point, candidates]));
  let races: readonly Race[] = [...points].map(([point, candidates]) => ({
    point,
    runners: candidates.map((choice, i) => ({ choice, isRules: i === 0, ms: [] })),
  }));
  for (let round = 0; round <= rounds; round++) {
    onRound?.(round);
    for (const trial of trialsOf(races, onlyWhole)) {
      const times = await measure(choicesOf(trial));
      // The first runs compile: they do not count.
      if (round === 0) continue;
      for (const { point, runner } of trial) if (times.has(point)) runner.ms.push(times.get(point)!);
    }
    if (round === 0) continue;
    races = races.filter(({ runners }) => runners[0]!.ms.length > 0).map(withoutHopeless);
  }
  return races.map(verdictOf);
}
