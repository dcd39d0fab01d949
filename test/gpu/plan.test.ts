/** Plans: recording within limits on the null backend; replays, feeds, slots and a growing arena with numbers. */
import { afterAll, describe, expect, test } from 'vitest';
import { Arena } from '../../src/gpu/arena.ts';
import { Device } from '../../src/gpu/device.ts';
import type { Dispatch, Virtual } from '../../src/gpu/kernel.ts';
import { Plan, type PlanSpec, type SlotBlocks } from '../../src/gpu/plan.ts';
import { copyOf, fromNchwOf } from '../../src/kernels/elementwise.ts';

const empty = await Device.open({ backend: 'null' });
const device = await Device.open().catch((error: Error) => {
  console.log(`[plan] no device, all numbers are skipped: ${error.message}`);
  return undefined;
});
afterAll(() => {
  empty.close();
  device?.close();
});

const COUNT = 64;

const tensor = (id: number, label: string, count = COUNT): Virtual => ({
  kind: 'virtual',
  id,
  label,
  sizeBytes: count * 4,
});

/** out = x + y, by the kernel that adds a residual. */
const sum = (x: Virtual, y: Virtual, out: Virtual): Dispatch =>
  fromNchwOf({
    label: out.label,
    images: 1,
    tokens: 1,
    channels: COUNT,
    storedChannels: COUNT,
    src: x,
    add: y,
    out,
  });

const copied = (x: Virtual, out: Virtual): Dispatch =>
  copyOf({ label: out.label, count: out.sizeBytes / 4, x, out });

const [a, b, c, d, e] = ['a', 'b', 'c', 'd', 'e'].map((label, id) => tensor(id, label)) as [
  Virtual,
  Virtual,
  Virtual,
  Virtual,
  Virtual,
];

/** c = a + b; d = c + b; e = d + a; or d = b where slot 3 has blocks. */
const SPEC: PlanSpec = {
  label: 'sums',
  storage: 'f32',
  steps: [
    { kind: 'always', dispatch: sum(a, b, c) },
    {
      kind: 'slots',
      down: copied(b, e),
      slots: [{ slot: 3, base: [sum(c, b, d)], main: [copied(e, d)] }],
    },
    { kind: 'always', dispatch: sum(d, a, e) },
  ],
  feeds: [a, b],
  results: [e],
};

const floats = (value: number, count = COUNT): Uint8Array =>
  new Uint8Array(new Float32Array(count).fill(value).buffer);

async function run(
  on: Device,
  arena: Arena,
  plan: Plan,
  feeds: readonly (readonly [Virtual, number])[],
  result: Virtual,
  blocks?: SlotBlocks,
): Promise<Float32Array> {
  for (const [feed, value] of feeds) plan.write(feed, floats(value, feed.sizeBytes / 4));
  return await on.guarded('run', async () => {
    const encoder = on.gpu.createCommandEncoder();
    plan.encode(encoder, { blocks });
    on.gpu.queue.submit([encoder.finish()]);
    const bytes = await on.read(arena.buffer, plan.offsetOf(result), result.sizeBytes);
    return new Float32Array(bytes.buffer, bytes.byteOffset, result.sizeBytes / 4);
  });
}

async function opened(on: Device, spec: PlanSpec): Promise<{ arena: Arena; plan: Plan }> {
  const arena = new Arena(on, 'arena');
  const plan = await Plan.compile(on, arena, spec);
  await arena.ensure(plan.arenaBytes);
  return { arena, plan };
}

describe('null rung: a plan', () => {
  test('counts the dispatches of a run without low-rank terms', async () => {
    const { plan } = await opened(empty, SPEC);
    expect(plan.dispatchCount).toBe(3);
  });

  test('shares room between tensors that are never alive together', async () => {
    const { plan } = await opened(empty, SPEC);
    // a lives throughout; b until the slot; c, d and e up to three at a time with them.
    expect(plan.arenaBytes).toBeLessThan(5 * 256 + 1);
    expect(plan.arenaBytes).toBeGreaterThanOrEqual(plan.lowerBoundBytes);
  });

  test('does not know the tensors of another', async () => {
    const { plan } = await opened(empty, SPEC);
    expect(() => plan.offsetOf(tensor(9, 'stranger'))).toThrow('stranger is no tensor of the plan sums');
  });

  test('of a tensor above the binding limit is refused with both numbers', async () => {
    const small = await Device.open({ backend: 'null', maxBindingBytes: 128 });
    await expect(opened(small, SPEC)).rejects.toMatchObject({
      code: 'ERR_TOO_LARGE',
      details: { needed: COUNT * 4, limit: 128 },
    });
    small.close();
  });

  test('of a grid above the limit is refused', async () => {
    const dispatch = { ...sum(a, b, c), grid: [65536, 1, 1] as const };
    const spec = { ...SPEC, steps: [{ kind: 'always' as const, dispatch }], results: [c] };
    await expect(opened(empty, spec)).rejects.toMatchObject({ code: 'ERR_TOO_LARGE' });
  });

  test('of a dispatch that binds one tensor twice is refused before the driver sees it', async () => {
    const spec = { ...SPEC, steps: [{ kind: 'always' as const, dispatch: sum(a, a, c) }], results: [c] };
    await expect(opened(empty, spec)).rejects.toThrow('c: "src" and "add" are the same tensor a');
  });

  test('of a dispatch without one of its params is refused by name', async () => {
    const dispatch = { ...sum(a, b, c), params: { tokens: 1 } };
    const spec = { ...SPEC, steps: [{ kind: 'always' as const, dispatch }], results: [c] };
    await expect(opened(empty, spec)).rejects.toThrow('param channels of from_nchw is missing');
  });
});

describe.skipIf(!device)('software rung: a plan', () => {
  test('gives the same result at every replay, and follows its feeds', async () => {
    const { arena, plan } = await opened(device!, SPEC);
    for (const [x, y] of [
      [1, 2],
      [1, 2],
      [5, 0.25],
      [1, 2],
    ] as const) {
      const feeds = [
        [a, x],
        [b, y],
      ] as const;
      const result = await run(device!, arena, plan, feeds, e);
      expect([...result]).toEqual(Array(COUNT).fill(2 * (x + y)));
    }
    plan.close();
    arena.close();
  });

  test('runs the other form of a slot where an image has blocks for it', async () => {
    const { arena, plan } = await opened(device!, SPEC);
    const feeds = [
      [a, 10],
      [b, 3],
    ] as const;
    expect((await run(device!, arena, plan, feeds, e, (slot) => (slot === 3 ? 1 : 0)))[0]).toBe(13);
    expect((await run(device!, arena, plan, feeds, e, (slot) => (slot === 3 ? 0 : 9)))[0]).toBe(26);
    plan.close();
    arena.close();
  });

  test('still runs after its arena grew for another', async () => {
    const { arena, plan } = await opened(device!, SPEC);
    const feeds = [
      [a, 2],
      [b, 4],
    ] as const;
    expect((await run(device!, arena, plan, feeds, e))[0]).toBe(12);
    const wide = tensor(0, 'wide', 4096);
    const other = await Plan.compile(device!, arena, {
      label: 'other',
      storage: 'f32',
      steps: [{ kind: 'always', dispatch: copied(wide, tensor(1, 'copy', 4096)) }],
      feeds: [wide],
      results: [tensor(1, 'copy', 4096)],
    });
    await arena.ensure(other.arenaBytes);
    expect((await run(device!, arena, other, [[wide, 7]], tensor(1, 'copy', 4096)))[4095]).toBe(7);
    expect((await run(device!, arena, plan, feeds, e))[COUNT - 1]).toBe(12);
    for (const one of [plan, other]) one.close();
    arena.close();
  });

  test('is profiled dispatch by dispatch with the result of a plain run', async () => {
    const { arena, plan } = await opened(device!, SPEC);
    plan.write(a, floats(1));
    plan.write(b, floats(2));
    const timings = await plan.profile();
    expect(timings.map((timing) => timing.label)).toEqual(['c', 'd', 'e']);
    expect(timings.every((timing) => timing.ms >= 0 && timing.ms < 1000)).toBe(true);
    const bytes = await device!.read(arena.buffer, plan.offsetOf(e), 4);
    expect(new Float32Array(bytes.buffer)[0]).toBe(6);
    device!.check();
    plan.close();
    arena.close();
  });
});
