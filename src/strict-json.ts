/**
 * A JSON reader for untrusted headers: objects become Maps (no prototype to pollute), duplicate keys, lone surrogates
 * and deep nesting are refused. Not a replacement for JSON.parse where those do not matter: it is slower.
 */

export type StrictJson = null | boolean | number | string | readonly StrictJson[] | StrictJsonObject;
export type StrictJsonObject = ReadonlyMap<string, StrictJson>;

interface Reader {
  readonly text: string;
  at: number;
}

const MAX_DEPTH = 16;
const NUMBER = /^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?$/;
const LITERALS: readonly (readonly [string, null | boolean])[] = [
  ['true', true],
  ['false', false],
  ['null', null],
];

function isSpace(code: number): boolean {
  return code === 0x20 || code === 0x0a || code === 0x0d || code === 0x09;
}

/** The next character that is no white space, or '' at the end; stands before it afterwards. */
function peek(reader: Reader): string {
  while (reader.at < reader.text.length && isSpace(reader.text.charCodeAt(reader.at))) reader.at++;
  return reader.text.charAt(reader.at);
}

function fail(reader: Reader, expected: string): never {
  const found = reader.at < reader.text.length ? JSON.stringify(reader.text.charAt(reader.at)) : 'the end';
  throw new SyntaxError(`expected ${expected} at character ${reader.at}, got ${found}`);
}

function readString(reader: Reader): string {
  if (peek(reader) !== '"') fail(reader, 'a string');
  const start = reader.at;
  let end = start;
  let backslashes = 0;
  do {
    end = reader.text.indexOf('"', end + 1);
    if (end < 0) throw new SyntaxError(`the string at character ${start} does not end`);
    backslashes = 0;
    while (reader.text.charAt(end - 1 - backslashes) === '\\') backslashes++;
  } while (backslashes % 2 === 1);
  let value: string;
  try {
    value = JSON.parse(reader.text.slice(start, end + 1)) as string;
  } catch {
    throw new SyntaxError(`the string at character ${start} holds a control character or a bad escape`);
  }
  if (/\p{Surrogate}/u.test(value))
    throw new SyntaxError(`the string at character ${start} is not valid Unicode`);
  reader.at = end + 1;
  return value;
}

function readNumber(reader: Reader): number {
  const start = reader.at;
  while (reader.at - start < 64 && '+-.0123456789eE'.includes(reader.text.charAt(reader.at) || ' '))
    reader.at++;
  const literal = reader.text.slice(start, reader.at);
  if (NUMBER.test(literal)) return Number(literal);
  reader.at = start;
  return fail(reader, 'a value');
}

function readArray(reader: Reader, depth: number): readonly StrictJson[] {
  reader.at++;
  const items: StrictJson[] = [];
  if (peek(reader) === ']') {
    reader.at++;
    return items;
  }
  for (;;) {
    items.push(readValue(reader, depth + 1));
    const next = peek(reader);
    if (next !== ',' && next !== ']') fail(reader, '"," or "]"');
    reader.at++;
    if (next === ']') return items;
  }
}

function readObject(reader: Reader, depth: number): StrictJsonObject {
  reader.at++;
  const fields = new Map<string, StrictJson>();
  if (peek(reader) === '}') {
    reader.at++;
    return fields;
  }
  for (;;) {
    const key = readString(reader);
    if (fields.has(key)) throw new SyntaxError(`the key ${JSON.stringify(key.slice(0, 200))} appears twice`);
    if (peek(reader) !== ':') fail(reader, '":"');
    reader.at++;
    fields.set(key, readValue(reader, depth + 1));
    const next = peek(reader);
    if (next !== ',' && next !== '}') fail(reader, '"," or "}"');
    reader.at++;
    if (next === '}') return fields;
  }
}

function readValue(reader: Reader, depth: number): StrictJson {
  if (depth > MAX_DEPTH)
    throw new SyntaxError(`nested deeper than ${MAX_DEPTH} levels at character ${reader.at}`);
  const next = peek(reader);
  if (next === '{') return readObject(reader, depth);
  if (next === '[') return readArray(reader, depth);
  if (next === '"') return readString(reader);
  for (const [word, value] of LITERALS) {
    if (reader.text.startsWith(word, reader.at)) {
      reader.at += word.length;
      return value;
    }
  }
  return readNumber(reader);
}

/** The value of a JSON text (RFC 8259). SyntaxError says what is wrong and at which character. */
export function parseStrictJson(text: string): StrictJson {
  const reader: Reader = { text, at: 0 };
  const value = readValue(reader, 0);
  if (peek(reader) !== '') fail(reader, 'the end');
  return value;
}
