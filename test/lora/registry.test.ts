/**
 * Rung `software`: adapters by name and by content, and who waits for whom where room is short: loads wait for leases, and no
 * lease for a load that waits. What steps compute meanwhile is test/engine/pool.test.ts.
 */
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { UnetdError } from '../../src/errors.ts';
import { Device } from '../../src/gpu/device.ts';
import { AdapterPool } from '../../src/lora/pool.ts';
import { AdapterRegistry, type AdapterSource } from '../../src/lora/registry.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { layersOf } from '../../src/unet/layers.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { trafficOf } from '../gpu/traffic.ts';
import { writeAdapter } from './files.ts';

const CONFIG = detectUNet(new Map(Object.entries(readFixture('sd1').metadata.tensors)));
const LAYERS = layersOf(CONFIG);
const folder = mkdtempSync(join(tmpdir(), 'unetd-registry-'));
const pathOf = (name: string): string => join(folder, `${name}.safetensors`);
const source = (name: string, version = '1'): AdapterSource => ({ name, path: pathOf(name), version });
const NAMES = ['a', 'b', 'c', 'd'] as const;
let device: Device;
/** What each of the four takes. */
let sizeBytes = 0;

beforeAll(async () => {
  device = await Device.open();
  for (const name of NAMES) writeAdapter(pathOf(name), name, LAYERS, 8, /attn1/);
  const { registry } = registryFor(1e9);
  await registry.load(source('a'));
  sizeBytes = registry.resident()[0]!.sizeBytes;
});
afterAll(() => {
  device.close();
  rmSync(folder, { recursive: true });
});

const pools: AdapterPool[] = [];
afterEach(() => {
  for (const pool of pools.splice(0)) pool.close();
});

function registryFor(budgetBytes: number, on: Device = device) {
  const pool = new AdapterPool(on, 'f32', LAYERS, { pages: 2, limitBytes: budgetBytes });
  pools.push(pool);
  const turnover = { adapterLoads: 0, adapterEvictions: 0 };
  const registry = new AdapterRegistry(CONFIG, pool, { budgetBytes, makeRoom: () => false, turnover });
  return { registry, pool, turnover };
}

/** A registry with room for so many of the four, all of which it has read once. */
async function roomFor(count: number) {
  const made = registryFor(count * sizeBytes);
  for (const name of NAMES) await made.registry.load(source(name));
  return made;
}

const residents = (registry: AdapterRegistry): string =>
  registry
    .resident()
    .map(({ lora }) => lora)
    .sort()
    .join('');

/** Long enough for any load here, by far. */
const A_WHILE_MS = 300;

async function isPending(promise: Promise<unknown>): Promise<boolean> {
  const settled = promise.then(
    () => false,
    () => false,
  );
  return Promise.race([settled, pause(A_WHILE_MS, true)]);
}

const codeOf = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => 'none',
    (error: unknown) => UnetdError.from(error).code,
  );

describe('an adapter under several names (software)', () => {
  test('lies on the GPU once, and nothing of it is uploaded for the second name', async () => {
    copyFileSync(pathOf('a'), pathOf('copy'));
    const { registry, pool, turnover } = registryFor(1e9);
    const facts = await registry.load(source('a'));
    const { sizeBytes: before } = pool;
    const [{ written }, again] = await trafficOf(() => registry.load(source('copy')));
    expect(written.size).toBe(0);
    expect(again).toEqual(facts);
    expect(pool.sizeBytes).toBe(before);
    expect(turnover).toEqual({ adapterLoads: 1, adapterEvictions: 0 });
    // Its bytes count once.
    expect(registry.resident()).toEqual([
      { lora: 'a', sizeBytes },
      { lora: 'copy', sizeBytes: 0 },
    ]);
    const { adapters, release } = await registry.use(['a', 'copy', 'a']);
    expect(new Set(adapters).size).toBe(1);
    release();
  });

  test('fits a room for one, twice in one stack', async () => {
    copyFileSync(pathOf('a'), pathOf('copy'));
    const { registry } = registryFor(sizeBytes);
    await registry.load(source('copy'));
    await registry.load(source('a'));
    await registry.load(source('b'));
    expect(residents(registry)).toBe('b');
    const { adapters, release } = await registry.use(['a', 'copy']);
    expect(adapters[0]).toBe(adapters[1]);
    release();
  });

  test('stays what it is for one name when the other gets other tensors', async () => {
    copyFileSync(pathOf('a'), pathOf('copy'));
    copyFileSync(pathOf('a'), pathOf('mine'));
    const { registry } = registryFor(1e9);
    const { digest } = await registry.load(source('copy'));
    await registry.load(source('mine'));
    copyFileSync(pathOf('b'), pathOf('mine'));
    expect((await registry.load(source('mine', '2'))).digest).not.toBe(digest);
    const { adapters, release } = await registry.use(['copy', 'mine']);
    expect(adapters[0]!.digest).toBe(digest);
    expect(adapters[1]!.digest).not.toBe(digest);
    release();
  });

  test('is there for a name whose own file is broken by now, once another name has brought it back', async () => {
    copyFileSync(pathOf('a'), pathOf('copy'));
    const { registry } = registryFor(sizeBytes);
    await registry.load(source('copy'));
    const { digest } = await registry.load(source('a'));
    await registry.load(source('b'));
    writeFileSync(pathOf('copy'), 'no adapter');
    expect(await codeOf(registry.use(['copy']))).toBe('ERR_SAFETENSORS');
    const { adapters, release } = await registry.use(['a']);
    expect(adapters[0]!.digest).toBe(digest);
    release();
    // On the GPU under one name, it is there for the other as well: the tensors are those that were loaded.
    const again = await registry.use(['copy']);
    expect(again.adapters[0]!.digest).toBe(digest);
    again.release();
  });

  test('takes its place from a lease of the old tensors only once that has ended', async () => {
    copyFileSync(pathOf('a'), pathOf('mine'));
    const { registry } = registryFor(1.5 * sizeBytes);
    const { digest } = await registry.load(source('mine'));
    const lease = await registry.use(['mine']);
    copyFileSync(pathOf('b'), pathOf('mine'));
    const loading = registry.load(source('mine', '2'));
    expect(await isPending(loading)).toBe(true);
    expect(lease.adapters[0]!.digest).toBe(digest);
    lease.release();
    expect((await loading).digest).not.toBe(digest);
    expect(registry.resident()).toHaveLength(1);
  });
});

describe('a load beside a lease (software)', () => {
  test('that holds all room waits for its end', async () => {
    const { registry, turnover } = await roomFor(2);
    const lease = await registry.use(['a', 'b']);
    const evictions = turnover.adapterEvictions;
    const loading = [registry.load(source('c')), registry.ready(['d'])];
    for (const promise of loading) expect(await isPending(promise)).toBe(true);
    expect(residents(registry)).toBe('ab');
    expect(turnover.adapterEvictions).toBe(evictions);
    lease.release();
    await Promise.all(loading);
    expect(residents(registry)).toBe('cd');
  });

  test('that would not make room even with all others gone, lets them stay', async () => {
    writeAdapter(pathOf('double'), 'double', LAYERS, 16, /attn1/);
    const { registry, turnover } = await roomFor(3);
    await registry.ready(['c']);
    const lease = await registry.use(['a', 'b']);
    const { adapterEvictions } = turnover;
    const loading = registry.load(source('double'));
    expect(await isPending(loading)).toBe(true);
    expect(residents(registry)).toBe('abc');
    expect(turnover.adapterEvictions).toBe(adapterEvictions);
    lease.release();
    await loading;
    expect(registry.resident()).toHaveLength(2);
  });

  test('that holds part of the room does not wait', async () => {
    const { registry } = await roomFor(2);
    const lease = await registry.use(['a']);
    await registry.load(source('c'));
    await registry.ready(['d']);
    expect(residents(registry)).toBe('ad');
    lease.release();
  });

  test('that waits holds up no lease, not even one that has to read its adapters', async () => {
    const { registry } = await roomFor(2);
    const lease = await registry.use(['a', 'b']);
    const loading = [registry.load(source('c')), registry.load(source('d'))];
    expect(await isPending(loading[0]!)).toBe(true);
    lease.release();
    // Takes turns with the loads, however they come to lie.
    for (let turn = 0; turn < 6; turn++) {
      const names = [NAMES[turn % 4]!, NAMES[(turn + 1) % 4]!];
      const { adapters, release } = await registry.use(names);
      expect(adapters).toHaveLength(2);
      const other = registry.ready([NAMES[(turn + 2) % 4]!]);
      expect(await isPending(other)).toBe(true);
      release();
      await other;
    }
    await Promise.all(loading);
  });

  test('that is refused while it waits, because the model goes, says so', async () => {
    const { registry, pool } = await roomFor(1);
    const lease = await registry.use(['a']);
    const loading = codeOf(registry.load(source('b')));
    expect(await isPending(loading)).toBe(true);
    registry.close();
    pool.close();
    lease.release();
    expect(await loading).toBe('ERR_MODEL_NOT_LOADED');
  });

  test('many of each in any order all end, and each lease holds what it named', async () => {
    const { registry } = await roomFor(2);
    const digests = new Map<string, string>();
    for (const name of NAMES) digests.set(name, (await registry.load(source(name))).digest);
    let seed = 7;
    const below = (limit: number): number => {
      seed = (seed * 48271) % 0x7fffffff;
      return seed % limit;
    };
    let turn: Promise<unknown> = Promise.resolve();
    const work = Array.from({ length: 60 }, async (_, i) => {
      const names = [NAMES[below(4)]!, NAMES[below(4)]!];
      if (i % 3 === 0) return registry.ready(names);
      // One lease at a time, as the engine has it.
      const mine = turn.then(async () => {
        const { adapters, release } = await registry.use(names);
        await pause(below(3));
        expect(adapters.map(({ digest }) => digest)).toEqual(names.map((name) => digests.get(name)));
        release();
      });
      turn = mine;
      return mine;
    });
    await Promise.all(work);
    expect(registry.resident().length).toBeLessThanOrEqual(2);
  });
});

describe('what can never fit (software)', () => {
  test('is refused at once, with the numbers, and nobody goes for it', async () => {
    const { registry, turnover } = await roomFor(2);
    await registry.ready(['a', 'b']);
    const { adapterEvictions } = turnover;
    const error = await registry.use(['a', 'b', 'a', 'c']).catch((reason: unknown) => reason);
    expect(error).toMatchObject({
      code: 'ERR_OUT_OF_MEMORY',
      details: { lora: 'c', needed: sizeBytes, used: 2 * sizeBytes, budget: 2 * sizeBytes },
    });
    expect((error as Error).message).toMatch(
      /LoRA "c" takes \d+ bytes .* may take \d+, .* take \d+: use fewer/,
    );
    expect(turnover.adapterEvictions).toBe(adapterEvictions);
    expect(residents(registry)).toBe('ab');
  });

  test('into a binding is refused beside a lease too, and nobody goes for it', async () => {
    const small = await Device.open({ maxBindingBytes: Math.floor(sizeBytes / 3) });
    const { registry, turnover } = registryFor(1e9, small);
    writeAdapter(pathOf('to_q'), 'to_q', LAYERS, 8, /input_blocks.1.1.*attn1.to_q$/);
    await registry.load(source('to_q'));
    const lease = await registry.use(['to_q']);
    // In two pages: half of `a` is too much for either.
    const error = await registry.load(source('a')).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code: 'ERR_OUT_OF_MEMORY' });
    expect((error as Error).message).toMatch(/no buffer that the GPU can bind/);
    expect(turnover.adapterEvictions).toBe(0);
    lease.release();
    small.close();
  });

  test('alone is refused beside a lease too, without waiting', async () => {
    writeAdapter(pathOf('large'), 'large', LAYERS, 64, /attn1/);
    const { registry } = await roomFor(2);
    const lease = await registry.use(['a', 'b']);
    expect(await codeOf(registry.load(source('large')))).toBe('ERR_OUT_OF_MEMORY');
    lease.release();
  });
});
