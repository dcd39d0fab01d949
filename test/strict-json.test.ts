/** The strict JSON reader against JSON.parse. No GPU. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseStrictJson, type StrictJson } from '../src/strict-json.ts';

const SEED = 0x5eed;

/** Maps back to plain objects, for comparison. */
function plain(value: StrictJson): unknown {
  if (value instanceof Map) return Object.fromEntries([...value].map(([key, item]) => [key, plain(item)]));
  return Array.isArray(value) ? value.map(plain) : value;
}

function outcome(parse: () => unknown): unknown {
  try {
    return parse();
  } catch (error) {
    expect(error).toBeInstanceOf(SyntaxError);
    return 'refused';
  }
}

describe('parseStrictJson', () => {
  it('reads any JSON text as JSON.parse does', () => {
    const texts = fc.json({ maxDepth: 4, stringUnit: 'binary' });
    fc.assert(
      fc.property(texts, (text) => {
        expect(plain(parseStrictJson(text))).toEqual(JSON.parse(text));
      }),
      { seed: SEED, numRuns: 1000 },
    );
  });

  it('refuses what JSON.parse refuses, and reads the rest alike', () => {
    const pieces = [
      '{',
      '}',
      '[',
      ']',
      ':',
      ',',
      '"',
      '"a"',
      '"b"',
      '\\',
      '\\u0061',
      '0',
      '01',
      '-',
      '1.5',
      '1e5',
      '.',
      'true',
      'nul',
      ' ',
      '\n',
      '\u00a0',
    ];
    fc.assert(
      fc.property(fc.array(fc.constantFrom(...pieces), { maxLength: 8 }), (parts) => {
        const text = parts.join('');
        const strict = outcome(() => plain(parseStrictJson(text)));
        if (strict === 'refused' && /"a".*"a"|"b".*"b"/s.test(text)) return;
        expect(strict, text).toEqual(outcome(() => JSON.parse(text)));
      }),
      { seed: SEED, numRuns: 20_000 },
    );
  });

  it('refuses duplicate keys at any depth, lone surrogates and deep nesting', () => {
    expect(() => parseStrictJson('{"a":[{"b":1,"\\u0062":2}]}')).toThrow(/the key "b" appears twice/);
    expect(() => parseStrictJson('"\\udc00"')).toThrow(/not valid Unicode/);
    expect(() => parseStrictJson('['.repeat(17))).toThrow(/nested deeper than 16/);
    expect(parseStrictJson(`${'['.repeat(16)}1${']'.repeat(16)}`)).toBeDefined();
  });

  it('keeps __proto__ as an ordinary key of a Map', () => {
    const value = parseStrictJson('{"__proto__":{"polluted":true}}') as ReadonlyMap<string, StrictJson>;
    expect([...value.keys()]).toEqual(['__proto__']);
    expect(({} as Record<string, unknown>).polluted).toBeUndefined();
  });
});
