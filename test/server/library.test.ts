/** Which files clients can name, what stays out of reach, and uploads. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, renameSync, rmSync, statSync, symlinkSync, utimesSync } from 'node:fs';
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { decode, digest, SafetensorsFile } from '../../src/safetensors.ts';
import { Library } from '../../src/server/library.ts';
import { openScratch } from '../../src/server/scratch.ts';
import { comfyPlace, loraFile, makePlace, modelFile, type Place, tensor } from './setting.ts';

let place: Place;
let library: Library;

const open = (
  models: readonly string[],
  loras: readonly string[] = [],
  uploadQuotaBytes = 1e8,
): Promise<Library> => Library.open({ models, loras, uploadQuotaBytes });

beforeEach(() => {
  place = comfyPlace();
});

afterEach(async () => {
  await library.close();
  place.remove();
});

const names = async (kind: 'model' | 'lora'): Promise<string[]> =>
  (await library.list(kind)).map(({ name }) => name);

describe('folders', () => {
  it('are read as ComfyUI lays them out', async () => {
    place.write('checkpoints/note.txt', loraFile(1));
    place.write('vae/vae.safetensors', loraFile(1));
    library = await open([place.dir]);
    expect(await names('model')).toEqual(['fast.safetensors', 'slow.safetensors', 'sub/small.safetensors']);
    expect(await names('lora')).toEqual(['double.safetensors', 'styles/minus.safetensors']);
  });

  it('may be plain, with a loras folder inside or named apart', async () => {
    const plain = makePlace();
    plain.write('a/b/c.safetensors', modelFile());
    plain.write('loras/l.safetensors', loraFile(1));
    library = await open([plain.dir], [join(place.dir, 'loras')]);
    expect(await names('model')).toEqual(['a/b/c.safetensors']);
    expect(await names('lora')).toEqual(['double.safetensors', 'l.safetensors', 'styles/minus.safetensors']);
    await expect(library.find('model', 'loras/l.safetensors')).rejects.toMatchObject({
      code: 'ERR_UNKNOWN_MODEL',
    });
    plain.remove();
  });

  it('must exist', async () => {
    library = await open([place.dir]);
    await expect(open(['/nowhere/at/all'])).rejects.toMatchObject({ code: 'ERR_BAD_REQUEST' });
  });

  it('give a version that changes with the file', async () => {
    library = await open([place.dir]);
    const before = await library.find('lora', 'double.safetensors');
    expect(await library.find('lora', 'double.safetensors')).toEqual(before);
    // File systems stamp in ticks of some milliseconds.
    await sleep(50);
    place.write('loras/double.safetensors', loraFile(7));
    const rewritten = await library.find('lora', 'double.safetensors');
    expect(rewritten.version).not.toBe(before.version);
    place.write('loras/other.safetensors', loraFile(8));
    const { atimeMs, mtimeMs } = statSync(rewritten.path);
    utimesSync(join(place.dir, 'loras/other.safetensors'), atimeMs / 1000, mtimeMs / 1000);
    renameSync(join(place.dir, 'loras/other.safetensors'), rewritten.path);
    expect((await library.find('lora', 'double.safetensors')).version).not.toBe(rewritten.version);
  });

  it.each([
    '../secret.safetensors',
    'sub/../../secret.safetensors',
    './fast.safetensors',
    '/etc/x.safetensors',
    'C:/x.safetensors',
    'sub\\small.safetensors',
    'sub//small.safetensors',
    'fast',
    'a\0.safetensors',
    '',
  ])('refuse the name %j', async (name) => {
    library = await open([place.dir]);
    place.write('secret.safetensors', modelFile());
    await expect(library.find('model', name)).rejects.toMatchObject({ code: 'ERR_BAD_REQUEST' });
  });

  it('follow links inside and refuse those that leave', async () => {
    const outside = makePlace();
    outside.write('secret.safetensors', modelFile());
    symlinkSync(
      join(place.dir, 'checkpoints/fast.safetensors'),
      join(place.dir, 'checkpoints/alias.safetensors'),
    );
    symlinkSync(join(outside.dir, 'secret.safetensors'), join(place.dir, 'checkpoints/leak.safetensors'));
    symlinkSync(outside.dir, join(place.dir, 'checkpoints/leak'));
    symlinkSync(join(place.dir, 'checkpoints'), join(place.dir, 'checkpoints/loop'));
    library = await open([place.dir]);
    expect((await library.find('model', 'alias.safetensors')).name).toBe('alias.safetensors');
    for (const name of ['leak.safetensors', 'leak/secret.safetensors']) {
      await expect(library.find('model', name)).rejects.toMatchObject({
        code: 'ERR_UNKNOWN_MODEL',
        message: expect.stringContaining('leaves'),
      });
    }
    const listed = await names('model');
    expect(listed).toContain('alias.safetensors');
    expect(listed.some((name) => name.includes('secret') || name.includes('leak'))).toBe(false);
    outside.remove();
  });

  it('may have a subfolder that is itself a link', async () => {
    const disk = makePlace();
    disk.write('big.safetensors', modelFile());
    const other = makePlace();
    mkdirSync(join(other.dir, 'loras'));
    symlinkSync(disk.dir, join(other.dir, 'checkpoints'));
    library = await open([other.dir]);
    expect(await names('model')).toEqual(['big.safetensors']);
    expect((await library.find('model', 'big.safetensors')).sizeBytes).toBeGreaterThan(0);
    disk.remove();
    other.remove();
  });

  it('say what a model file states and give small values', async () => {
    library = await open([place.dir]);
    const { header, values } = await library.header('fast.safetensors', ['small', 'small']);
    expect(header.tensors.large).toEqual({ dtype: 'F32', shape: [20_000] });
    expect(header.metadata.config).toContain('inChannels');
    expect(values).toEqual([{ name: 'small', dtype: 'F32', shape: [3], data: tensor('', [1, 2, 3]).data }]);
    await expect(library.header('fast.safetensors', ['large'])).rejects.toMatchObject({
      code: 'ERR_TOO_LARGE',
    });
    await expect(library.header('fast.safetensors', ['none'])).rejects.toMatchObject({
      code: 'ERR_BAD_REQUEST',
    });
  });
});

describe('uploads', () => {
  const tensors = [tensor('b', [1, 2]), tensor('a', [3], [1, 1]), tensor('ü', [])];
  const hex = digest(tensors);
  const put = (part: number, parts: number, of = tensors, changes: object = {}): Promise<boolean> =>
    library.uploads.put(
      { kind: 'lora', owner: 'me', digest: hex, part, parts, tensors: of, ...changes },
      () => false,
    );

  beforeEach(async () => {
    library = await open([place.dir]);
  });

  it('come back as the file they were, whole or in parts', async () => {
    expect(library.missing('lora', [hex])).toEqual([hex]);
    expect(await put(0, 3, tensors.slice(0, 1))).toBe(false);
    expect(await put(1, 3, tensors.slice(1, 2))).toBe(false);
    expect(await put(2, 3, tensors.slice(2))).toBe(true);
    expect(library.missing('lora', [hex])).toEqual([]);
    expect(library.missing('model', [hex])).toEqual([hex]);
    const file = await library.find('lora', `sha256:${hex}`);
    const read = await SafetensorsFile.open(file.path);
    expect(await read.digest()).toBe(hex);
    await read.close();
    expect(await put(0, 1)).toBe(true);
  });

  it('may be sent without waiting for each part', async () => {
    const parts = tensors.map((each, part) => put(part, 3, [each]));
    expect(await Promise.all(parts)).toEqual([false, false, true]);
  });

  it('are refused when the digest is not theirs', async () => {
    await expect(put(0, 1, tensors.slice(1))).rejects.toMatchObject({
      code: 'ERR_DIGEST_MISMATCH',
      details: { expected: hex },
    });
    expect(library.uploads.usage.bytes).toBe(0);
    expect(await put(0, 1)).toBe(true);
  });

  it('are refused out of order, with a tensor twice, and beyond the quota', async () => {
    await expect(put(1, 2)).rejects.toMatchObject({ code: 'ERR_BAD_REQUEST' });
    await put(0, 3, tensors.slice(0, 1));
    await expect(put(2, 3, tensors.slice(1))).rejects.toMatchObject({ code: 'ERR_BAD_REQUEST' });
    await put(0, 2, tensors.slice(0, 1));
    await expect(put(1, 2)).rejects.toMatchObject({ code: 'ERR_BAD_REQUEST' });
    const huge = [tensor('huge', new Array(30_000_000).fill(0))];
    await expect(put(0, 1, huge)).rejects.toMatchObject({ code: 'ERR_TOO_LARGE' });
    expect(library.uploads.usage.bytes).toBe(0);
  });

  it('drop unfinished parts with their connection', async () => {
    await put(0, 2, tensors.slice(0, 1));
    await library.uploads.dropOwner('me');
    expect(library.uploads.usage.bytes).toBe(0);
    await expect(put(1, 2)).rejects.toMatchObject({ code: 'ERR_BAD_REQUEST' });
  });

  it('make room by dropping the least recently used that nobody needs', async () => {
    await library.close();
    library = await open([place.dir], [], 250);
    const sets = [1, 2, 3, 4].map((n) => [tensor('t', [n])]);
    const keys = sets.map((set) => digest(set));
    const needed = new Set([`sha256:${keys[0]}`]);
    for (const [index, set] of sets.entries()) {
      const part = {
        kind: 'lora',
        owner: 'me',
        digest: keys[index]!,
        part: 0,
        parts: 1,
        tensors: set,
      } as const;
      await library.uploads.put(part, (_kind, name) => needed.has(name));
    }
    expect(library.missing('lora', keys)).toEqual([keys[1]]);
  });

  it('live in a private folder that goes with the library', async () => {
    await put(0, 1);
    const { path } = await library.find('lora', `sha256:${hex}`);
    expect(decode((await import('node:fs')).readFileSync(path)).tensors.size).toBe(3);
    await library.close();
    expect(existsSync(path)).toBe(false);
    rmSync(path, { force: true });
  });

  it('of a server that was killed are removed when the next one starts, and no others', async () => {
    const parent = makePlace();
    const host = basename(await openScratch(parent.dir)).replace(/^unetd-uploads-(.+)-\d+-\w{6}$/, '$1');
    const dead = spawnSync(process.execPath, ['-e', '']).pid;
    const folder = (name: string): string => {
      const path = join(parent.dir, name);
      parent.write(`${name}/part-1`, Buffer.from('x'));
      return path;
    };
    const gone = folder(`unetd-uploads-${host}-${dead}-abcdef`);
    const kept = [
      folder(`unetd-uploads-${host}-${process.ppid}-abcdef`),
      folder(`unetd-uploads-${host}-${process.pid}-abcdef`),
      folder(`unetd-uploads-elsewhere.${host}-${dead}-abcdef`),
      folder(`unetd-uploads-${host}-${dead}-abc`),
      folder(`other-${host}-${dead}-abcdef`),
    ];
    const link = join(parent.dir, `unetd-uploads-${host}-${dead}-ABCDEF`);
    symlinkSync(kept[0]!, link);
    const own = await openScratch(parent.dir);
    expect([gone, ...kept, link, own].map((path) => existsSync(path))).toEqual([
      false,
      ...kept.map(() => true),
      true,
      true,
    ]);
    expect(statSync(own).mode & 0o777).toBe(0o700);
    parent.remove();
  });

  it('may be begun and left unfinished only so often', async () => {
    const begin = (n: number, owner = 'me'): Promise<boolean> =>
      put(0, 2, [tensor('t', [n])], { owner, digest: n.toString(16).padStart(64, '0') });
    await library.close();
    library = await open([place.dir], [], 1e12);
    for (let n = 0; n < 16; n += 1) await begin(n);
    await expect(begin(16)).rejects.toMatchObject({ code: 'ERR_BUSY' });
    expect(await begin(16, 'another')).toBe(false);
    await library.uploads.dropOwner('me');
    expect(await begin(17)).toBe(false);
  });

  it('must be named by a digest', async () => {
    await expect(library.find('lora', 'sha256:abc')).rejects.toMatchObject({ code: 'ERR_BAD_REQUEST' });
    await expect(library.find('lora', `sha256:${'0'.repeat(64)}`)).rejects.toMatchObject({
      code: 'ERR_UNKNOWN_LORA',
    });
    expect(() => library.missing('lora', ['ABC'])).toThrow('no digest');
  });
});
