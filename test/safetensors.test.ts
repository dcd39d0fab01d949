/** Safetensors: round trips, every lie a header can tell, files on disk, and the digest. No GPU. */
import { createHash } from 'node:crypto';
import { mkdtemp, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { UnetdError } from '../src/errors.ts';
import {
  DTYPE_BYTES,
  type Dtype,
  decode,
  digest,
  encode,
  SafetensorsFile,
  type TensorView,
} from '../src/safetensors.ts';

const SEED = 0x5eed;
const DTYPES = Object.keys(DTYPE_BYTES) as Dtype[];

function file(header: string, dataBytes = 0): Uint8Array {
  const json = Buffer.from(header);
  const out = new Uint8Array(8 + json.length + dataBytes);
  new DataView(out.buffer).setBigUint64(0, BigInt(json.length), true);
  out.set(json, 8);
  return out;
}

function entry(dtype: string, shape: string, offsets: string): string {
  return `{"dtype":${dtype},"shape":${shape},"data_offsets":${offsets}}`;
}

function failure(run: () => unknown): UnetdError {
  try {
    run();
  } catch (error) {
    if (error instanceof UnetdError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}

/** Any Unicode text without what names may not hold. */
const names = fc
  .string({ unit: 'binary', maxLength: 12 })
  .filter((name) => !name.includes('\0') && name !== '__proto__' && name !== '__metadata__');
const tensors: fc.Arbitrary<TensorView> = fc
  .tuple(names, fc.constantFrom(...DTYPES), fc.array(fc.nat(4), { maxLength: 4 }), fc.nat(255))
  .map(([name, dtype, shape, fill]) => {
    const count = shape.reduce((product, size) => product * size, 1);
    return { name, dtype, shape, data: new Uint8Array(count * DTYPE_BYTES[dtype]).fill(fill) };
  });
const files = fc.tuple(
  fc.uniqueArray(tensors, { selector: (tensor) => tensor.name, maxLength: 8 }),
  fc.dictionary(fc.string({ unit: 'binary' }), fc.string({ unit: 'binary' }), { maxKeys: 4 }),
);

function metadataOf(record: Readonly<Record<string, string>>): Map<string, string> {
  return new Map(Object.entries(record).filter(([key]) => key !== '__proto__'));
}

describe('encode and decode', () => {
  it('give back every tensor and all metadata, from aligned and unaligned buffers', () => {
    fc.assert(
      fc.property(files, fc.nat(7), ([list, record], shift) => {
        const metadata = metadataOf(record);
        const bytes = encode(list, metadata);
        const moved = new Uint8Array(bytes.length + shift).subarray(shift);
        moved.set(bytes);
        const view = decode(moved);
        expect(view.metadata).toEqual(metadata);
        expect(view.tensors).toEqual(new Map(list.map((tensor) => [tensor.name, tensor])));
        for (const { data } of view.tensors.values()) expect(data.buffer).toBe(moved.buffer);
      }),
      { seed: SEED, numRuns: 500 },
    );
  });

  it('write the same bytes and the same digest whatever the order of the tensors', () => {
    fc.assert(
      fc.property(files, ([list]) => {
        const reversed = [...list].reverse();
        expect(encode(reversed)).toEqual(encode(list));
        expect(digest(reversed)).toBe(digest(list));
      }),
      { seed: SEED },
    );
  });

  it('align every tensor to its element size', () => {
    const list = DTYPES.map((dtype) => ({
      name: dtype,
      dtype,
      shape: [3],
      data: new Uint8Array(3 * DTYPE_BYTES[dtype]),
    }));
    for (const { dtype, data } of decode(encode(list)).tensors.values()) {
      expect(data.byteOffset % DTYPE_BYTES[dtype]).toBe(0);
    }
  });

  it('refuse to encode what decode would refuse', () => {
    const tensor: TensorView = { name: 'a', dtype: 'F32', shape: [1], data: new Uint8Array(4) };
    const bad: readonly TensorView[][] = [
      [tensor, tensor],
      [{ ...tensor, name: '__metadata__' }],
      [{ ...tensor, name: '__proto__' }],
      [{ ...tensor, name: 'a\0b' }],
      [{ ...tensor, name: '\ud800' }],
      [{ ...tensor, dtype: 'F31' as Dtype }],
      [{ ...tensor, shape: [2] }],
      [{ ...tensor, shape: [-1] }],
      [{ ...tensor, shape: [0.5, 2] }],
    ];
    for (const list of bad) expect(failure(() => encode(list)).code).toBe('ERR_SAFETENSORS');
    expect(failure(() => encode([], new Map([['a', '\udfff']]))).code).toBe('ERR_SAFETENSORS');
    expect(failure(() => encode([], new Map([['__proto__', '']]))).code).toBe('ERR_SAFETENSORS');
  });
});

describe('decode', () => {
  const f32 = entry('"F32"', '[1]', '[0,4]');
  const huge = file('{}');
  new DataView(huge.buffer).setBigUint64(0, 2n ** 64n - 1n, true);
  const large = file('{}');
  new DataView(large.buffer).setBigUint64(0, 100_000_001n, true);
  const lies: readonly (readonly [string, Uint8Array, RegExp])[] = [
    ['no bytes', new Uint8Array(0), /has 0 bytes/],
    ['seven bytes', new Uint8Array(7), /has 7 bytes/],
    ['a length of 2^64 - 1', huge, /18446744073709551615 bytes, at most 100000000/],
    ['a length over 100 MB', large, /100000001 bytes, at most/],
    ['a length past the end', file('{}').subarray(0, 9), /ends at byte 10, the file at 9/],
    ['an empty header', file(''), /not valid JSON/],
    ['broken JSON', file('{"a":'), /not valid JSON: expected a value at character 5, got the end/],
    ['text behind the object', file('{} {}'), /expected the end at character 3/],
    ['invalid UTF-8', file('{"a":1}').fill(0xff, 9, 10), /not valid JSON/],
    ['a byte order mark', file('\ufeff{}'), /not valid JSON/],
    ['a lone surrogate', file(`{"\\ud800":${f32}}`, 4), /not valid Unicode/],
    ['an unescaped control character', file(`{"a\nb":${f32}}`, 4), /control character/],
    ['deep nesting', file('['.repeat(1_000_000)), /nested deeper than 16/],
    ['an array', file('[]'), /header is \[\], not a JSON object/],
    ['null', file('null'), /header is null/],
    ['a tensor twice', file(`{"a":${f32},"a":${f32}}`, 4), /the key "a" appears twice/],
    ['a tensor twice by escapes', file(`{"a":${f32},"\\u0061":${f32}}`, 4), /the key "a" appears twice/],
    [
      'a field twice',
      file('{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4),
      /"dtype" appears twice/,
    ],
    [
      'an unknown field',
      file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', 4),
      /tensor "a": unknown field "x"/,
    ],
    [
      'a missing field',
      file('{"a":{"dtype":"F32","data_offsets":[0,4]}}', 4),
      /the field "shape" is missing/,
    ],
    ['an entry that is no object', file('{"a":[1]}'), /its entry is \[1\]/],
    ['an unknown dtype', file(`{"a":${entry('"F31"', '[1]', '[0,4]')}}`, 4), /unknown dtype "F31"/],
    [
      'a dtype of Object.prototype',
      file(`{"a":${entry('"constructor"', '[1]', '[0,4]')}}`, 4),
      /unknown dtype "constructor"/,
    ],
    ['a dtype that is no string', file(`{"a":${entry('7', '[1]', '[0,4]')}}`, 4), /unknown dtype 7/],
    [
      'a shape that is no list',
      file(`{"a":${entry('"F32"', '1', '[0,4]')}}`, 4),
      /the shape is 1, not a list/,
    ],
    ['a negative size', file(`{"a":${entry('"F32"', '[-1]', '[0,4]')}}`, 4), /the shape \[-1\]/],
    ['a fractional size', file(`{"a":${entry('"F32"', '[0.5,2]', '[0,4]')}}`, 4), /the shape \[0.5,2\]/],
    ['an unsafe size', file(`{"a":${entry('"F32"', '[9007199254740993]', '[0,4]')}}`, 4), /the shape/],
    ['a size of 1e400', file(`{"a":${entry('"F32"', '[1e400]', '[0,4]')}}`, 4), /the shape/],
    ['a string as size', file(`{"a":${entry('"F32"', '["1"]', '[0,4]')}}`, 4), /the shape \["1"\]/],
    [
      'a product that overflows',
      file(`{"a":${entry('"F32"', '[4294967296,4294967296]', '[0,0]')}}`),
      /the shape/,
    ],
    [
      'a product that overflows and ends in 0',
      file(`{"a":${entry('"F32"', '[4294967296,4294967296,0]', '[0,0]')}}`),
      /the shape/,
    ],
    ['offsets that are no list', file(`{"a":${entry('"F32"', '[1]', '4')}}`, 4), /data_offsets is 4/],
    ['three offsets', file(`{"a":${entry('"F32"', '[1]', '[0,4,8]')}}`, 4), /data_offsets is \[0,4,8\]/],
    ['negative offsets', file(`{"a":${entry('"F32"', '[1]', '[-4,0]')}}`, 4), /data_offsets is/],
    ['offsets out of order', file(`{"a":${entry('"F32"', '[1]', '[4,0]')}}`, 4), /end before they begin/],
    [
      'a size that is not shape times dtype',
      file(`{"a":${entry('"F16"', '[3]', '[0,4]')}}`, 4),
      /F16 \[3\] takes 6 bytes, data_offsets \[0,4\] hold 4/,
    ],
    [
      'an overlap',
      file(`{"a":${f32},"b":${entry('"F32"', '[1]', '[2,6]')}}`, 6),
      /tensor "b": begins at byte 2 .* the end of "a" is at 4: they overlap/,
    ],
    ['a hole', file(`{"a":${f32},"b":${entry('"F32"', '[1]', '[6,10]')}}`, 10), /tensor "b": .* a hole/],
    ['a hole at the start', file(`{"a":${entry('"F32"', '[1]', '[4,8]')}}`, 8), /the start is at 0: a hole/],
    ['data past the end', file(`{"a":${f32}}`, 3), /tensor "a": ends at byte .* truncated/],
    ['trailing bytes', file(`{"a":${f32}}`, 5), /1 trailing bytes/],
    ['trailing bytes without tensors', file('{}', 1), /1 trailing bytes/],
    ['metadata that is no object', file('{"__metadata__":[]}'), /__metadata__ is \[\]/],
    ['metadata with a number', file('{"__metadata__":{"a":1}}'), /__metadata__\["a"\] is 1, not a string/],
    ['metadata twice', file('{"__metadata__":{},"__metadata__":{}}'), /"__metadata__" appears twice/],
    ['metadata named __proto__', file('{"__metadata__":{"__proto__":"a"}}'), /"__proto__"/],
    ['a tensor named __proto__', file(`{"__proto__":${f32}}`, 4), /"__proto__" is not allowed/],
    ['a tensor name with NUL', file(`{"a\\u0000b":${f32}}`, 4), /NUL/],
    ['a pickle', Uint8Array.from({ length: 64 }, (_, i) => [0x50, 0x4b, 3, 4][i] ?? 0xff), /PyTorch pickle/],
  ];

  it.each(lies)('refuses %s', (_, bytes, message) => {
    const error = failure(() => decode(bytes, 'lie.safetensors'));
    expect(error.code).toBe('ERR_SAFETENSORS');
    expect(error.message).toMatch(message);
    expect(error.message).toContain('"lie.safetensors"');
    expect(error.details).toMatchObject({ file: 'lie.safetensors' });
  });

  it('keeps messages short when names are long', () => {
    const name = 'x'.repeat(100_000);
    const error = failure(() => decode(file(`{"${name}":${entry('"F31"', '[1]', '[0,4]')}}`, 4)));
    expect(error.message.length).toBeLessThan(400);
  });

  it('accepts scalars, empty tensors, spaces, escaped names and entries out of data order', () => {
    const view = decode(
      file(
        `{ "b" : ${entry('"F16"', '[]', '[4,6]')} , "\\u0061\\"\\\\" : ${f32}, "e":${entry('"I64"', '[0,7]', '[6,6]')}}  `,
        6,
      ),
    );
    expect([...view.tensors.keys()]).toEqual(['a"\\', 'b', 'e']);
    expect(view.tensors.get('b')?.shape).toEqual([]);
  });

  it('meets arbitrary bytes with an UnetdError or a valid view', () => {
    const bytes = fc.oneof(
      fc.uint8Array({ maxLength: 64 }),
      fc.string({ maxLength: 80 }).map((text) => file(text)),
      fc.json().map((text) => file(text)),
    );
    fc.assert(
      fc.property(bytes, (input) => {
        try {
          decode(input);
        } catch (error) {
          expect(error).toBeInstanceOf(UnetdError);
          expect((error as UnetdError).code).toBe('ERR_SAFETENSORS');
        }
      }),
      { seed: SEED, numRuns: 3000 },
    );
  });

  it('meets mutated files with an UnetdError or a view whose tensors fill the data exactly', () => {
    const edits = fc.array(fc.tuple(fc.nat(), fc.nat(255), fc.constantFrom('set', 'cut', 'insert')), {
      minLength: 1,
      maxLength: 4,
    });
    fc.assert(
      fc.property(files, edits, ([list, record], changes) => {
        let bytes = encode(list, metadataOf(record));
        for (const [at, byte, kind] of changes) {
          const place = at % bytes.length;
          if (kind === 'set') bytes[place] = byte;
          else if (kind === 'cut') bytes = bytes.slice(0, Math.max(1, place));
          else bytes = Uint8Array.of(...bytes.subarray(0, place), byte, ...bytes.subarray(place));
        }
        try {
          const view = decode(bytes);
          const sum = [...view.tensors.values()].reduce((total, { data }) => total + data.byteLength, 0);
          const header = Number(new DataView(bytes.buffer).getBigUint64(0, true));
          expect(8 + header + sum).toBe(bytes.length);
        } catch (error) {
          if (!(error instanceof UnetdError)) throw error;
          expect(error.code).toBe('ERR_SAFETENSORS');
        }
      }),
      { seed: SEED, numRuns: 2000 },
    );
  });
});

describe('digest', () => {
  it('is the SHA-256 of name, dtype, shape and data in code point order', () => {
    // U+FF5E sorts before U+1F600 by code point, behind it by UTF-16 unit.
    const list: readonly TensorView[] = [
      { name: '\u{1f600}', dtype: 'U8', shape: [2], data: Uint8Array.of(3, 4) },
      { name: '\uff5e', dtype: 'F16', shape: [1, 1], data: Uint8Array.of(1, 2) },
      { name: 'a', dtype: 'F32', shape: [], data: Uint8Array.of(5, 6, 7, 8) },
    ];
    const expected = createHash('sha256')
      .update(Buffer.concat([Buffer.from('a\0F32\0\0'), Buffer.of(5, 6, 7, 8)]))
      .update(Buffer.concat([Buffer.from('\uff5e\0F16\x001,1\0'), Buffer.of(1, 2)]))
      .update(Buffer.concat([Buffer.from('\u{1f600}\0U8\x002\0'), Buffer.of(3, 4)]))
      .digest('hex');
    expect(digest(list)).toBe(expected);
    expect(digest([])).toBe(createHash('sha256').digest('hex'));
  });
});

describe('SafetensorsFile', () => {
  let folder = '';
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'unetd-'));
  });
  afterAll(() => rm(folder, { recursive: true }));

  const list: readonly TensorView[] = [
    { name: 'a', dtype: 'F32', shape: [2, 2], data: Uint8Array.from({ length: 16 }, (_, i) => i) },
    { name: 'b', dtype: 'F16', shape: [3], data: Uint8Array.from({ length: 6 }, (_, i) => 100 + i) },
  ];

  it('reads the header at once and tensors in pieces, and digests as in memory', async () => {
    const path = join(folder, 'good.safetensors');
    await writeFile(path, encode(list, new Map([['k', 'v']])));
    const opened = await SafetensorsFile.open(path);
    try {
      expect(opened.name).toBe('good.safetensors');
      expect(opened.metadata).toEqual(new Map([['k', 'v']]));
      expect(await opened.read('a')).toEqual(list[0]!.data);
      const target = new Uint8Array(4);
      await opened.readInto(opened.tensors.get('b')!, target.subarray(1, 4), 2);
      expect([...target]).toEqual([0, 102, 103, 104]);
      expect(await opened.digest()).toBe(digest(list));
      await expect(opened.read('c')).rejects.toMatchObject({ code: 'ERR_SAFETENSORS' });
      await expect(opened.readInto(opened.tensors.get('b')!, target, 3)).rejects.toThrow(
        /bytes 3 to 7 .* has 6/,
      );
      await truncate(path, 100);
      await expect(opened.read('a')).rejects.toThrow(/while being read/);
    } finally {
      await opened.close();
    }
  });

  it('tells a file that was written to since it was opened, with the same bytes too', async () => {
    const path = join(folder, 'rewritten.safetensors');
    await writeFile(path, encode(list));
    const opened = await SafetensorsFile.open(path);
    await opened.checkUnchanged();
    // Past the tick of a file system's clock.
    await new Promise((resolve) => setTimeout(resolve, 20));
    await writeFile(path, encode(list));
    await expect(opened.checkUnchanged()).rejects.toMatchObject({
      code: 'ERR_SAFETENSORS',
      message: expect.stringMatching(/rewritten.safetensors.*written to while it was read; try again/),
    });
    await opened.close();
  });

  it('refuses what is no such file, without naming its folder', async () => {
    await writeFile(join(folder, 'short.safetensors'), new Uint8Array(3));
    await writeFile(join(folder, 'cut.safetensors'), encode(list).subarray(0, 40));
    await writeFile(
      join(folder, 'model.ckpt'),
      Uint8Array.from({ length: 64 }, (_, i) => [0x80, 2][i] ?? 0xff),
    );
    const cases = {
      'short.safetensors': /has 3 bytes/,
      'cut.safetensors': /truncated/,
      'model.ckpt': /pickle/,
      absent: /ENOENT/,
    };
    for (const [name, message] of Object.entries(cases)) {
      const error = await SafetensorsFile.open(join(folder, name)).catch((reason: unknown) => reason);
      expect(error).toMatchObject({ code: 'ERR_SAFETENSORS', message: expect.stringMatching(message) });
      expect((error as Error).message).not.toContain(folder);
    }
    await expect(SafetensorsFile.open(folder)).rejects.toThrow(/EISDIR|bytes/);
  });
});
