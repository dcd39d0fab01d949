/** Which candidates are kept, by times that are made up: no GPU. */
import { describe, expect, test } from 'vitest';
import type { Choices, Decision } from '../../src/gpu/kernel.ts';
import { compare, type Verdict } from '../../src/tune/compare.ts';

const decision = (point: string, ...variants: readonly string[]): Decision => ({
  point,
  candidates: variants.map((variant) => ({ variant })),
});

/** Milliseconds of a candidate in a round; 0 is the one in which everything is compiled. */
type Cost = (point: string, variant: string, round: number) => number;

/** Runs `compare` against made-up costs; what each run was asked to measure is in `runs`. */
async function raced(
  decisions: readonly Decision[],
  cost: Cost,
  { rounds = 5, onlyWhole = false } = {},
): Promise<{ verdicts: ReadonlyMap<string, Verdict>; runs: readonly Choices[] }> {
  const runs: Choices[] = [];
  let now = 0;
  const measure = async (choices: Choices): Promise<ReadonlyMap<string, number>> => {
    runs.push(choices);
    const of = ({ point, candidates }: Decision): number =>
      cost(point, (choices.get(point) ?? candidates[0]!).variant, now);
    const all = decisions.reduce((sum, one) => sum + of(one), 0);
    return new Map(decisions.map((one) => [one.point, onlyWhole ? all : of(one)]));
  };
  const onRound = (round: number): void => {
    now = round;
  };
  const verdicts = await compare(decisions, measure, { rounds, onlyWhole, onRound });
  return { verdicts: new Map(verdicts.map((verdict) => [verdict.point, verdict])), runs };
}

const TWO = [decision('a', 'rules', 'slow', 'quick'), decision('b', 'rules', 'quick')];
const COSTS: Readonly<Record<string, number>> = { rules: 10, slow: 12, quick: 8 };

describe('comparing candidates', () => {
  test('keeps the fastest of each point, all points measured in the same runs', async () => {
    const { verdicts, runs } = await raced(TWO, (_, variant) => COSTS[variant]!);
    expect(verdicts.get('a')).toEqual({
      point: 'a',
      rules: { choice: { variant: 'rules' }, ms: 10 },
      better: { choice: { variant: 'quick' }, ms: 8 },
    });
    expect(verdicts.get('b')!.better!.choice.variant).toBe('quick');
    // As many runs a round as the longest list has candidates, and a round before them.
    expect(runs).toHaveLength(6 * 3);
  });

  test('measures one candidate at a time where only whole forwards can be timed', async () => {
    const { verdicts, runs } = await raced(TWO, (_, variant) => COSTS[variant]!, { onlyWhole: true });
    expect(verdicts.get('a')!.better).toEqual({ choice: { variant: 'quick' }, ms: 18 });
    expect(runs).toHaveLength(6 * 4);
    const others = runs.map((choices) => [...choices.values()].filter(({ variant }) => variant !== 'rules'));
    expect(Math.max(...others.map(({ length }) => length))).toBe(1);
  });

  test.each([
    ['2 % faster', () => 9.8],
    ['faster in most rounds and slower in the others', (round: number) => (round > 3 ? 10.5 : 5.5)],
    ['faster only while everything is compiled', (round: number) => (round === 0 ? 1 : 10)],
  ])('keeps the rules where another is %s', async (_, quick) => {
    const cost: Cost = (_point, variant, round) => (variant === 'quick' ? quick(round) : 10);
    const { verdicts } = await raced([decision('a', 'rules', 'quick')], cost);
    expect(verdicts.get('a')!.better).toBeUndefined();
  });

  test('compares within rounds: a machine that slows down for a while hides nothing', async () => {
    const cost: Cost = (_, variant, round) => (variant === 'quick' ? 9 : 10) * (round % 2 ? 3 : 1);
    const { verdicts } = await raced([decision('a', 'rules', 'quick')], cost);
    expect(verdicts.get('a')!.better!.choice.variant).toBe('quick');
  });

  test('measures a hopeless candidate once', async () => {
    const cost: Cost = (_, variant) => (variant === 'slow' ? 100 : 10);
    const { verdicts, runs } = await raced([decision('a', 'rules', 'slow')], cost);
    expect(runs.filter((choices) => choices.get('a')?.variant === 'slow')).toHaveLength(2);
    expect(verdicts.get('a')!.better).toBeUndefined();
  });

  test('drops the others where the rules are hopeless, and takes the best of them', async () => {
    const cost: Cost = (_, variant) => ({ rules: 100, slow: 50, quick: 10 })[variant]!;
    const { verdicts } = await raced([decision('a', 'rules', 'slow', 'quick')], cost);
    expect(verdicts.get('a')!.better).toEqual({ choice: { variant: 'quick' }, ms: 10 });
  });

  test('tells choices of one variant apart by what else they say', async () => {
    const candidates = [1, 2, 4].map((splits) => ({ variant: 'tile', splits }));
    const measure = async (choices: Choices): Promise<ReadonlyMap<string, number>> => {
      const { splits } = (choices.get('a') ?? candidates[0]) as (typeof candidates)[number];
      return new Map([['a', Math.abs(splits - 2) + 5]]);
    };
    const [verdict] = await compare([{ point: 'a', candidates }], measure, { rounds: 3, onlyWhole: false });
    expect(verdict!.better!.choice).toEqual({ variant: 'tile', splits: 2 });
  });

  test('says nothing of points that no run came by', async () => {
    const { verdicts } = await raced([decision('a', 'rules', 'quick')], () => 1);
    expect([...verdicts.keys()]).toEqual(['a']);
    const none = await compare([decision('b', 'rules', 'quick')], async () => new Map(), {
      rounds: 2,
      onlyWhole: false,
    });
    expect(none).toEqual([]);
  });
});
