/** The file of measured choices: what is kept of it, for which device it counts, and what happens where it is broken. No GPU. */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  choicesFor,
  defaultTuningFile,
  kernelRevision,
  readTunings,
  type Tuning,
  withTuning,
  writeTunings,
} from '../../src/engine/tuning.ts';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'unetd-tuning-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

const HERE = { hardware: 'a card', driver: 'vulkan 1.2', revision: 'abc' };
const tuning = (choices: Readonly<Record<string, string>>, where = HERE): Tuning => ({
  ...where,
  choices: new Map(Object.entries(choices).map(([point, variant]) => [point, { variant }])),
});

describe('the file of measured choices', () => {
  test('gives back what was written, further properties of a choice included', () => {
    const path = join(folder, 'deep', 'down', 'tuning.json');
    const written = [{ ...HERE, choices: new Map([['gemm rows=1', { variant: 'tile', splits: 4 }]]) }];
    writeTunings(path, written);
    expect(readTunings(path)).toEqual(written);
    expect(readdirSync(join(path, '..'))).toEqual(['tuning.json']);
  });

  test.each(['hardware', 'driver', 'revision'] as const)('counts for no other %s', (field) => {
    const tunings = [tuning({ a: 'tile' })];
    expect(choicesFor(tunings, HERE)!.get('a')).toEqual({ variant: 'tile' });
    expect(choicesFor(tunings, { ...HERE, [field]: 'another' })).toBeUndefined();
  });

  test('takes what was measured beside older choices, and forgets those where the rules turned out to be best', () => {
    const before = [tuning({ a: 'tile', b: 'tile', c: 'tile' })];
    const measured = new Map([
      ['b', { variant: 'row' }],
      ['c', undefined],
      ['d', undefined],
    ]);
    expect(withTuning(before, HERE, measured)).toEqual([tuning({ a: 'tile', b: 'row' })]);
  });

  test('holds nothing of the same hardware with other drivers and kernels, and all of other hardware', () => {
    const other = tuning({ a: 'row' }, { ...HERE, hardware: 'another card' });
    const newer = { ...HERE, revision: 'def' };
    const measured = new Map([['b', { variant: 'row' }]]);
    expect(withTuning([tuning({ a: 'tile' }), other], newer, measured)).toEqual([
      other,
      tuning({ b: 'row' }, newer),
    ]);
  });

  test('is none where there is no such file', () => {
    expect(readTunings(join(folder, 'nowhere.json'))).toBeUndefined();
  });

  const entry = (choices: string): string =>
    `[{"hardware": "a", "driver": "b", "revision": "c", "choices": ${choices}}]`;

  test.each([
    ['', /expected a value|the end/],
    ['{}', /it holds no list/],
    ['[1]', /an entry is no object/],
    ['[{"hardware": "a", "driver": 1}]', /"driver" of an entry is no string/],
    [entry('[]'), /"choices" of an entry is no object/],
    [entry('{"p": "tile"}'), /the choice of "p" is no object/],
    [entry('{"p": {"splits": 4}}'), /the choice of "p" names no variant/],
  ])('is refused by name where it holds %j', (text, why) => {
    const path = join(folder, 'broken.json');
    writeFileSync(path, text);
    expect(() => readTunings(path)).toThrow(why);
    expect(() => readTunings(path)).toThrow(`${path} is no file that "unetd tune" wrote`);
  });

  test('lies in the user cache of the platform', () => {
    expect(defaultTuningFile({ XDG_CACHE_HOME: '/cache' }, 'linux')).toBe('/cache/unetd/tuning.json');
    expect(defaultTuningFile({}, 'linux')).toMatch(/\/\.cache\/unetd\/tuning\.json$/);
    expect(defaultTuningFile({}, 'darwin')).toMatch(/\/Library\/Caches\/unetd\/tuning\.json$/);
  });

  test('names the kernels by a revision that is the same each time', () => {
    expect(kernelRevision()).toMatch(/^[0-9a-f]{16}$/);
    expect(kernelRevision()).toBe(kernelRevision());
  });
});
