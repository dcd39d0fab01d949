/** Patched weights as they are kept, let go, and made in passing where there is no room (rung `software`). Numbers: test/engine/kinds.test.ts. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Device, Usage } from '../../src/gpu/device.ts';
import { parseAdapter } from '../../src/lora/adapter.ts';
import { type PatchedOptions, PatchedWeights } from '../../src/lora/patched.ts';
import { AdapterPool, type PlacedAdapter } from '../../src/lora/pool.ts';
import type { StackEntry } from '../../src/lora/table.ts';
import { PatchWork } from '../../src/lora/work.ts';
import { decode, encode } from '../../src/safetensors.ts';
import type { UNetConfig } from '../../src/unet/config.ts';
import { layersOf } from '../../src/unet/layers.ts';
import type { Weights } from '../../src/unet/weights.ts';
import { readFixture } from '../fixtures/fixture.ts';
import { readKinds } from '../fixtures/kinds.ts';
import { checkpointOf, loadWeights } from '../unet/whole.ts';

const kinds = readKinds('sd1');
let device: Device;
let model: { config: UNetConfig; weights: Weights };
let pool: AdapterPool;
const adapters = new Map<string, PlacedAdapter>();

beforeAll(async () => {
  device = await Device.open();
  const [path, remove] = checkpointOf(readFixture('sd1'));
  model = await loadWeights(device, 'f16', path);
  remove();
  pool = new AdapterPool(device, 'f16', layersOf(model.config), { pages: 3 });
  for (const file of ['style', 'dora', 'glora', 'boft', 'norms', 'loha-wide']) {
    const tensors = kinds.tensorsOf(file).map(({ key, shape, values }) => ({
      name: key,
      dtype: 'F32' as const,
      shape,
      data: new Uint8Array(values.buffer),
    }));
    adapters.set(file, (await pool.add(await parseAdapter(decode(encode(tensors)), model.config)))!);
  }
});
afterAll(() => device.close());

const stackOf = (...uses: readonly (readonly [string, number])[]): readonly StackEntry[] =>
  uses.map(([file, strength]) => ({ adapter: adapters.get(file)!, strength }));

interface Opened {
  readonly patched: PatchedWeights;
  readonly work: PatchWork;
  /** Dispatches recorded so far. */
  readonly recorded: () => number;
}

function patchedWith(limitBytes: number, options: Partial<PatchedOptions> = {}): Opened {
  const work = new PatchWork(device);
  let count = 0;
  const record = work.recorder.record.bind(work.recorder);
  work.recorder.record = (...args) => {
    count += 1;
    record(...args);
  };
  const patched = new PatchedWeights(device, 'f16', model.config, model.weights, work, {
    limitBytes,
    spareBytes: () => Number.POSITIVE_INFINITY,
    ensure: (arena, sizeBytes) => arena.ensure(sizeBytes),
    blocks: (slot) => pool.operand(slot),
    ...options,
  });
  return { patched, work, recorded: () => count };
}

/** Uses every substitute once, as a run would, and gives the bytes that each image sees of each tensor. */
async function use(
  { patched }: Opened,
  stacks: readonly (readonly StackEntry[])[],
): Promise<ReadonlyMap<string, Buffer>> {
  const patching = await patched.open(patched.read(stacks)!);
  const seen = new Map<string, Buffer>();
  for (const [tensor, byImage] of patching.substitutes)
    for (const [image, substitute] of byImage.entries()) {
      if (!substitute) continue;
      const { size } = substitute.current();
      const staging = device.createBuffer('staging', size, Usage.MAP_READ | Usage.COPY_DST);
      await device.guarded(tensor, () => {
        const encoder = device.gpu.createCommandEncoder();
        const pass = encoder.beginComputePass();
        substitute.ready(pass);
        pass.end();
        encoder.copyBufferToBuffer(substitute.current(), 0, staging, 0, size);
        device.gpu.queue.submit([encoder.finish()]);
      });
      seen.set(`${tensor} ${image}`, Buffer.from(await device.readMapped(staging, size)));
      staging.destroy();
    }
  patching.close(true);
  return seen;
}

/** What lies in a shared buffer behind the tensor does not count. */
function expectSame(got: ReadonlyMap<string, Buffer>, want: ReadonlyMap<string, Buffer>): void {
  expect([...got.keys()].sort()).toEqual([...want.keys()].sort());
  const different = [...want].filter(([key, bytes]) => {
    const other = got.get(key)!;
    return Buffer.compare(other.subarray(0, bytes.length), bytes.subarray(0, other.length)) !== 0;
  });
  expect(different.map(([key]) => key)).toEqual([]);
}

const mixed = (): readonly (readonly StackEntry[])[] => [
  stackOf(['style', 0.5], ['dora', 0.8], ['boft', 0.5]),
  stackOf(['style', 1]),
  stackOf(['glora', -0.5], ['style', 0.5], ['norms', 1]),
];

describe('patched weights (software)', () => {
  test('are made once and kept while the same stacks are used', async () => {
    const opened = patchedWith(Number.POSITIVE_INFINITY);
    const first = await use(opened, mixed());
    const { sizeBytes } = opened.patched;
    const recorded = opened.recorded();
    expect(sizeBytes).toBeGreaterThan(0);
    expect(recorded).toBeGreaterThan(first.size);
    expectSame(await use(opened, mixed()), first);
    // The same stacks at other images are the same tensors.
    expectSame(
      new Map(
        [...(await use(opened, [...mixed()].reverse()))].map(([k, v]) => [
          k.replace(/\d$/, (i) => `${2 - Number(i)}`),
          v,
        ]),
      ),
      first,
    );
    expect(opened.recorded()).toBe(recorded);
    expect(opened.patched.sizeBytes).toBe(sizeBytes);
    opened.patched.close();
    expect(opened.patched.sizeBytes).toBe(0);
    opened.work.close();
  });

  test('hold all of a stack where a tensor is patched, and leave the rest to the matmuls', () => {
    const { patched } = patchedWith(0);
    expect(patched.read([stackOf(['style', 1]), stackOf(['dora', 0])])).toBeUndefined();
    const reading = patched.read([stackOf(['style', 1], ['dora', 1]), stackOf(['style', 1], ['norms', 1])])!;
    const left = reading.stacks.map((stack) => stack.map(({ adapter }) => adapter.layers.size));
    const all = adapters.get('style')!.layers.size;
    expect(adapters.get('dora')!.patches.size).toBe(all);
    expect(left).toEqual([
      [0, 0],
      [all, 0],
    ]);
    expect(reading.byImage[0]!.get('out.2.weight')!.steps.map(({ patch }) => patch.rule)).toEqual([
      'low rank',
      'low rank',
    ]);
    expect([...reading.byImage[1]!.keys()].sort()).toEqual([...adapters.get('norms')!.patches.keys()].sort());
  });

  test('are made in passing where there is no room, to the same bytes', async () => {
    const roomy = patchedWith(Number.POSITIVE_INFINITY);
    const want = await use(roomy, mixed());
    const all = roomy.patched.sizeBytes;
    for (const limitBytes of [0, Math.floor(all / 2)]) {
      const tight = patchedWith(limitBytes);
      for (let round = 0; round < 2; round++) {
        expectSame(await use(tight, mixed()), want);
        expect(tight.patched.sizeBytes).toBeLessThanOrEqual(limitBytes);
      }
      // Twice as much is made twice over where nothing is kept, less where half is.
      if (limitBytes === 0) expect(tight.recorded()).toBe(2 * roomy.recorded());
      else expect(tight.recorded()).toBeLessThan(2 * roomy.recorded());
      tight.patched.close();
      tight.work.close();
    }
    const poor = patchedWith(Number.POSITIVE_INFINITY, { spareBytes: () => 0 });
    expectSame(await use(poor, mixed()), want);
    expect(poor.patched.sizeBytes).toBe(0);
    poor.work.close();
    roomy.patched.close();
    roomy.work.close();
  });

  test('of the stack that was used least recently go first, and none that a batch binds', async () => {
    const probe = patchedWith(Number.POSITIVE_INFINITY);
    await use(probe, [stackOf(['dora', 1])]);
    const one = probe.patched.sizeBytes;
    // Room for two stacks, and for what is made in passing.
    const opened = patchedWith(2 * one + 1024);
    await use(opened, [stackOf(['dora', 1])]);
    await use(opened, [stackOf(['dora', 0.5])]);
    const two = opened.recorded();
    await use(opened, [stackOf(['dora', 1])]);
    expect(opened.recorded()).toBe(two);
    await use(opened, [stackOf(['dora', 0.25])]);
    const three = opened.recorded();
    await use(opened, [stackOf(['dora', 1])]);
    expect(opened.recorded()).toBe(three);
    await use(opened, [stackOf(['dora', 0.5])]);
    expect(opened.recorded()).toBeGreaterThan(three);
    expect(opened.patched.sizeBytes).toBeLessThanOrEqual(2 * one + 1024);

    const bound = await opened.patched.open(opened.patched.read([stackOf(['dora', 0.5])])!);
    while (opened.patched.evictOne());
    expect(opened.patched.sizeBytes).toBe(one);
    expect(opened.patched.idleBytes).toBe(0);
    bound.close(true);
    expect(opened.patched.idleBytes).toBe(one);
    for (const { patched, work } of [opened, probe]) {
      patched.close();
      work.close();
    }
  });

  test('that were never run are dropped', async () => {
    const opened = patchedWith(Number.POSITIVE_INFINITY);
    const patching = await opened.patched.open(opened.patched.read(mixed())!);
    expect(opened.patched.sizeBytes).toBeGreaterThan(0);
    patching.close(false);
    patching.close(true);
    expect(opened.patched.sizeBytes).toBe(0);
    opened.work.close();
  });

  test('that exceed a binding in f32 are refused with both sizes, and nothing is left behind', async () => {
    const small = await Device.open({ maxBindingBytes: 64 * 1024 });
    const work = new PatchWork(small);
    const patched = new PatchedWeights(small, 'f16', model.config, model.weights, work, {
      limitBytes: Number.POSITIVE_INFINITY,
      spareBytes: () => Number.POSITIVE_INFINITY,
      ensure: (arena, sizeBytes) => arena.ensure(sizeBytes),
      blocks: (slot) => pool.operand(slot),
    });
    await expect(patched.open(patched.read(mixed())!)).rejects.toMatchObject({
      code: 'ERR_TOO_LARGE',
      message: expect.stringMatching(/takes \d+ bytes in f32, the adapter binds at most 65536/),
    });
    expect(patched.sizeBytes).toBe(0);
    work.close();
    small.close();
  });
});
