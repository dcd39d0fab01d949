/** Which forwards are on their way together, and in which order. No GPU. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Turns } from '../../src/engine/turns.ts';

const settle = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

/** A forward that the test moves on. */
interface Work {
  isBegun: boolean;
  submit: () => void;
  end: () => void;
  fail: () => void;
}

function give(turns: Turns): { readonly work: Work; readonly result: Promise<string> } {
  const work: Work = { isBegun: false, submit: () => {}, end: () => {}, fail: () => {} };
  const result = turns.take((submitted) => {
    work.isBegun = true;
    work.submit = submitted;
    return new Promise<string>((resolve, reject) => {
      work.end = () => resolve('done');
      work.fail = () => reject(new Error('failed'));
    });
  });
  result.catch(() => {});
  return { work, result };
}

describe('turns', () => {
  test('begin a forward when the one before is submitted and the one before that is over', async () => {
    const turns = new Turns();
    const all = [0, 1, 2, 3].map(() => give(turns).work);
    const begun = async (): Promise<string> => {
      await settle();
      return all.map(({ isBegun }) => (isBegun ? '1' : '0')).join('');
    };
    expect(await begun()).toBe('1000');
    all[0]!.submit();
    expect(await begun()).toBe('1100');
    all[1]!.submit();
    expect(await begun()).toBe('1100');
    all[0]!.end();
    expect(await begun()).toBe('1110');
    all[1]!.end();
    expect(await begun()).toBe('1110');
    all[2]!.submit();
    expect(await begun()).toBe('1111');
  });

  test('go on behind one that fails before it is submitted', async () => {
    const turns = new Turns();
    const [first, second] = [give(turns), give(turns)];
    await settle();
    first.work.fail();
    await expect(first.result).rejects.toThrow('failed');
    await settle();
    expect(second.work.isBegun).toBe(true);
  });

  test('are over when the last two are, in whatever order they end', async () => {
    const turns = new Turns();
    const [first, second] = [give(turns).work, give(turns).work];
    let isOver = false;
    void turns.done().then(() => {
      isOver = true;
    });
    await settle();
    first.submit();
    await settle();
    second.fail();
    await settle();
    expect(isOver).toBe(false);
    first.end();
    await settle();
    expect(isOver).toBe(true);
  });

  test('let each forward begin once, in order, two at most on their way, one of them not yet submitted', async () => {
    const moves = fc.array(fc.constantFrom('give', 'submit', 'end', 'fail'), { maxLength: 60 });
    await fc.assert(
      fc.asyncProperty(moves, fc.infiniteStream(fc.nat()), async (list, choices) => {
        const turns = new Turns();
        const all: { work: Work; isSubmitted: boolean; isOver: boolean }[] = [];
        for (const move of [...list, ...Array.from({ length: 40 }, () => 'end' as const)]) {
          const open = all.filter(({ work, isOver }) => work.isBegun && !isOver);
          const one = open[choices.next().value! % Math.max(1, open.length)];
          if (move === 'give') all.push({ work: give(turns).work, isSubmitted: false, isOver: false });
          else if (one && move === 'submit') {
            one.isSubmitted = true;
            one.work.submit();
          } else if (one) {
            one.isOver = true;
            one.work[move as 'end' | 'fail']();
          }
          await settle();
          const under = all.filter(({ work, isOver }) => work.isBegun && !isOver);
          expect(under.length).toBeLessThanOrEqual(2);
          expect(under.filter(({ isSubmitted }) => !isSubmitted).length).toBeLessThanOrEqual(1);
          const begun = all.map(({ work }) => work.isBegun);
          expect(begun.lastIndexOf(true) + 1).toBe(begun.filter(Boolean).length);
        }
        if (all.length <= 40) expect(all.every(({ isOver }) => isOver)).toBe(true);
      }),
      { numRuns: 100 },
    );
  });
});
