/** Which requests run together: rules, fairness and limits, on a clock that the test moves. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Batcher, type BatcherOptions, type Job } from '../../src/server/batcher.ts';
import { TestClock } from './test-clock.ts';

interface Running {
  readonly jobs: readonly Job<number>[];
  readonly turn: { readonly startedAt: number };
  readonly finish: () => void;
  readonly fail: (error: Error) => void;
}

function setUp(options: Partial<BatcherOptions> = {}): {
  clock: TestClock;
  batcher: Batcher<number, number>;
  runs: Running[];
  /** Most batches that were in flight at once. */
  most: () => number;
  submit: (owner: string, changes?: Partial<Job<number>>, signal?: AbortSignal) => Promise<number>;
  finishAll: () => Promise<void>;
} {
  const clock = new TestClock();
  const runs: Running[] = [];
  let inFlight = 0;
  let most = 0;
  const batcher = new Batcher<number, number>(
    { capOf: () => 4, waitMs: 0, queueLimit: 1000, ...options },
    (jobs, turn) =>
      new Promise<readonly PromiseSettledResult<number>[]>((resolve, reject) => {
        const finish = (): void => resolve(jobs.map(({ work }) => ({ status: 'fulfilled', value: work })));
        runs.push({ jobs, turn, finish, fail: reject });
        inFlight += 1;
        most = Math.max(most, inFlight);
      }).finally(() => {
        inFlight -= 1;
      }),
    clock,
  );
  let next = 0;
  return {
    clock,
    batcher,
    runs,
    most: () => most,
    submit: (owner, changes = {}, signal) => {
      const job = { owner, model: 'm', key: 'k', images: 1, work: next++, ...changes };
      const result = batcher.submit(job, signal);
      result.catch(() => {});
      return result;
    },
    finishAll: async () => {
      for (let done = 0; done < runs.length; done += 1) {
        runs[done]!.finish();
        await settle();
      }
    },
  };
}

const settle = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
const owners = (run: Running | undefined): string => (run?.jobs ?? []).map(({ owner }) => owner).join('');

describe('the batcher', () => {
  it('starts a lone request at once and gathers those that come meanwhile', async () => {
    const { runs, submit, finishAll, batcher } = setUp();
    const results = ['a', 'b', 'c', 'd'].map((owner) => submit(owner));
    expect(runs.map(owners)).toEqual(['a']);
    expect(batcher.waiting).toBe(3);
    await finishAll();
    expect(runs.map(owners)).toEqual(['a', 'bcd']);
    expect(await Promise.all(results)).toEqual([0, 1, 2, 3]);
  });

  it('joins only requests of one model and key', async () => {
    const { runs, submit, finishAll } = setUp();
    submit('z');
    submit('a');
    submit('b', { model: 'other' });
    submit('c', { key: 'other' });
    submit('d');
    await finishAll();
    expect(runs.map(owners)).toEqual(['z', 'ad', 'b', 'c']);
  });

  it('fills up to the cap in images and lets a larger request run alone', async () => {
    const { runs, submit, finishAll } = setUp();
    submit('z');
    submit('a', { images: 9 });
    submit('b', { images: 2 });
    submit('c', { images: 3 });
    submit('d', { images: 2 });
    await finishAll();
    expect(runs.map(owners)).toEqual(['z', 'a', 'bd', 'c']);
  });

  it('takes one request of each connection before a second of any', async () => {
    const { runs, submit, finishAll } = setUp();
    for (let i = 0; i < 6; i += 1) submit('a');
    submit('b');
    submit('c');
    await finishAll();
    expect(runs.map(owners)).toEqual(['a', 'abca', 'aaa']);
  });

  it('does not let a busy connection hold up one with other shapes', async () => {
    const { runs, submit, finishAll } = setUp({ capOf: () => 1 });
    for (let i = 0; i < 5; i += 1) submit('a');
    submit('b', { key: 'other' });
    await finishAll();
    expect(runs.map(owners)).toEqual(['a', 'a', 'b', 'a', 'a', 'a']);
  });

  it('waits for company as long as it is told, and not when the batch is full', async () => {
    const { runs, submit, clock } = setUp({ waitMs: 10 });
    submit('a');
    clock.advance(6);
    submit('b');
    expect(runs).toHaveLength(0);
    clock.advance(4);
    expect(runs.map(owners)).toEqual(['ab']);
    const full = setUp({ waitMs: 10 });
    for (const owner of ['a', 'b', 'c', 'd']) full.submit(owner);
    expect(full.runs.map(owners)).toEqual(['abcd']);
  });

  it('runs a full batch of one model while another still waits for company', () => {
    const { runs, submit } = setUp({ waitMs: 10 });
    submit('a', { model: 'slow' });
    for (const owner of ['b', 'c', 'd', 'e']) submit(owner);
    expect(runs.map(owners)).toEqual(['bcde']);
  });

  it('refuses beyond the queue limit with a hint', async () => {
    const { submit } = setUp({ queueLimit: 2 });
    submit('a');
    submit('b');
    submit('b');
    await expect(submit('b')).rejects.toMatchObject({
      code: 'ERR_BUSY',
      details: { retryAfterMs: expect.any(Number), limit: 2 },
    });
  });

  it('takes the last place of the connection with most requests for one with fewer', async () => {
    const { runs, submit, finishAll } = setUp({ queueLimit: 4 });
    submit('z');
    const [, , third, fourth] = [1, 2, 3, 4].map(() => submit('a'));
    const quiet = [submit('b'), submit('c')];
    for (const lost of [third, fourth]) await expect(lost).rejects.toMatchObject({ code: 'ERR_BUSY' });
    await expect(submit('b')).rejects.toMatchObject({ code: 'ERR_BUSY' });
    await finishAll();
    expect(await Promise.all(quiet)).toEqual([5, 6]);
    expect(runs.map(owners)).toEqual(['z', 'abca']);
  });

  it('gives a lead to who comes rarely before another to who has led meanwhile', async () => {
    const { clock, runs, submit } = setUp({ capOf: () => 1 });
    let done = 0;
    const finish = async (): Promise<void> => {
      clock.advance(10);
      runs[done++]?.finish();
      await settle();
    };
    for (let i = 0; i < 64; i += 1) submit('f');
    await finish();
    for (let i = 0; i < 3; i += 1) {
      submit('v', { key: 'other' });
      await finish();
      await finish();
    }
    expect(runs.map(owners).join('')).toBe('ffvfvfvf');
  });

  it('counts time, not batches: short batches lead oftener than long ones', async () => {
    const { clock, runs, submit } = setUp({ capOf: () => 1 });
    for (let i = 0; i < 40; i += 1) {
      submit('long', { key: 'l' });
      submit('short', { key: 's' });
    }
    const time = { long: 0, short: 0 };
    for (let turn = 0; turn < 24; turn += 1) {
      const owner = runs[turn]!.jobs[0]!.owner as 'long' | 'short';
      const ms = owner === 'long' ? 50 : 10;
      time[owner] += ms;
      clock.advance(ms);
      runs[turn]!.finish();
      await settle();
    }
    expect(Math.abs(time.long - time.short)).toBeLessThanOrEqual(50);
  });

  it('does not let a model that waits for company hold up another of the same connection', () => {
    const { runs, submit } = setUp({ waitMs: 10 });
    submit('a', { model: 'slow' });
    for (let i = 0; i < 4; i += 1) submit('a');
    expect(runs.map(({ jobs }) => jobs.map(({ model }) => model).join(''))).toEqual(['mmmm']);
  });

  it('drops a cancelled request at once, waiting or running', async () => {
    const { runs, submit, finishAll, batcher } = setUp();
    const controller = new AbortController();
    const running = submit('a', {}, controller.signal);
    const waiting = submit('a', {}, controller.signal);
    const other = submit('b');
    controller.abort(new Error('cancelled'));
    await expect(running).rejects.toThrow('cancelled');
    await expect(waiting).rejects.toThrow('cancelled');
    expect(batcher.waiting).toBe(1);
    await expect(submit('c', {}, controller.signal)).rejects.toThrow('cancelled');
    await finishAll();
    expect(runs.map(owners)).toEqual(['a', 'b']);
    expect(await other).toBe(2);
  });

  it.each([
    [40, 30],
    [400, 375],
  ])('takes the next batch shortly before one that usually takes %d ms is over', async (usualMs, openMs) => {
    const { clock, runs, submit } = setUp();
    submit('a');
    clock.advance(usualMs);
    runs[0]!.finish();
    await settle();
    submit('a');
    submit('b');
    clock.advance(openMs - 1);
    submit('c');
    expect(runs.map(owners)).toEqual(['a', 'a']);
    clock.advance(1);
    expect(runs.map(owners)).toEqual(['a', 'a', 'bc']);
    // Two are enough, however long the first takes.
    for (const owner of ['d', 'e', 'f', 'g']) submit(owner);
    clock.advance(10 * usualMs);
    expect(runs).toHaveLength(3);
    runs[1]!.finish();
    await settle();
    expect(runs[2]!.turn.startedAt).toBe(clock.now());
  });

  it('takes none before the end of a batch of a shape or size that it has not seen', async () => {
    const { clock, runs, submit } = setUp();
    for (const job of [{}, { images: 2 }, { key: 'other' }, {}, {}]) submit('a', job);
    for (let turn = 0; turn < 2; turn += 1) {
      clock.advance(100);
      expect(runs).toHaveLength(turn + 1);
      runs[turn]!.finish();
      await settle();
    }
    expect(runs.map(({ jobs }) => jobs.length)).toEqual([1, 3, 1]);
  });

  it('learns nothing from a batch of which any request failed', async () => {
    const { clock, runs, submit } = setUp();
    submit('a');
    clock.advance(100);
    runs[0]!.finish();
    await settle();
    submit('a');
    runs[1]!.fail(new Error('broken'));
    await settle();
    submit('a');
    submit('b');
    clock.advance(74);
    expect(runs).toHaveLength(3);
    clock.advance(1);
    expect(runs).toHaveLength(4);
  });

  it('drops a request that is cancelled just before its batch would be taken', async () => {
    const { clock, runs, submit, finishAll } = setUp();
    submit('a');
    clock.advance(100);
    runs[0]!.finish();
    await settle();
    submit('a');
    const controller = new AbortController();
    const late = submit('b', {}, controller.signal);
    clock.advance(74);
    controller.abort(new Error('cancelled'));
    clock.advance(26);
    await expect(late).rejects.toThrow('cancelled');
    await finishAll();
    expect(runs.map(owners)).toEqual(['a', 'a']);
  });

  it('goes on after a batch that rejects', async () => {
    const { runs, submit, finishAll } = setUp();
    const bad = submit('a');
    const good = submit('b');
    runs[0]?.fail(new Error('broken'));
    await expect(bad).rejects.toThrow('broken');
    await finishAll();
    expect(await good).toBe(1);
  });
});

describe('any stream of requests', () => {
  const jobs = fc.array(
    fc.record({
      owner: fc.constantFrom('a', 'b', 'c', 'd'),
      model: fc.constantFrom('m', 'n'),
      key: fc.constantFrom('k', 'l'),
      images: fc.integer({ min: 1, max: 6 }),
      cancel: fc.integer({ min: 0, max: 9 }).map((n) => n === 0),
    }),
    { maxLength: 40 },
  );

  it('is answered once each, in batches that belong together and fit, within one lead of every other connection', async () => {
    await fc.assert(
      fc.asyncProperty(jobs, fc.nat(5), fc.nat(200), async (stream, waitMs, batchMs) => {
        const { runs, batcher, clock, most } = setUp({ waitMs });
        const results = stream.map(({ cancel, ...job }, work) => {
          const controller = new AbortController();
          const result = batcher.submit({ ...job, work }, controller.signal);
          if (cancel) controller.abort(new Error('cancelled'));
          return result.then(
            (value) => value,
            () => 'cancelled',
          );
        });
        for (let turn = 0; turn < stream.length + 1 || batcher.waiting > 0; turn += 1) {
          clock.advance(waitMs + batchMs);
          runs[turn]?.finish();
          await settle();
        }
        const answers = await Promise.all(results);
        for (const [index, answer] of answers.entries()) {
          expect(answer).toBe(stream[index]!.cancel ? 'cancelled' : index);
        }
        expect(most()).toBeLessThanOrEqual(2);
        const ran = runs.flatMap((run) => run.jobs.map(({ work }) => work));
        expect(new Set(ran).size).toBe(ran.length);
        for (const { jobs: batch } of runs) {
          expect(new Set(batch.map(({ model, key }) => `${model} ${key}`)).size).toBe(1);
          const images = batch.reduce((sum, job) => sum + job.images, 0);
          expect(images <= 4 || batch.length === 1).toBe(true);
        }
        expectTurns(runs.map(({ jobs: batch }) => batch));
      }),
      { numRuns: 200 },
    );
  });
});

/** While a connection waits and gets no place in a batch, no other connection leads twice. */
function expectTurns(batches: readonly (readonly Job<number>[])[]): void {
  const waiting = new Map<string, number>();
  for (const batch of batches)
    for (const { owner } of batch) waiting.set(owner, (waiting.get(owner) ?? 0) + 1);
  const ledSince = new Map<string, Set<string>>();
  // The very first batch starts before the others have arrived.
  for (const [index, batch] of batches.entries()) {
    const leader = batch[0]!.owner;
    const served = new Set(batch.map(({ owner }) => owner));
    for (const { owner } of batch) waiting.set(owner, waiting.get(owner)! - 1);
    if (index > 0) {
      for (const [owner, left] of waiting) {
        if (served.has(owner) || left === 0) continue;
        const seen = ledSince.get(owner) ?? new Set<string>();
        expect(seen.has(leader)).toBe(false);
        ledSince.set(owner, seen.add(leader));
      }
    }
    for (const owner of served) ledSince.delete(owner);
  }
}
