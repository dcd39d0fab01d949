/** Dispatches run in parts, where some images bind something else in the place of a tensor. Pure, and with numbers (`software`). */
import { afterAll, describe, expect, test } from 'vitest';
import { Arena } from '../../src/gpu/arena.ts';
import { Device, Usage } from '../../src/gpu/device.ts';
import type { Dispatch, Resident, Virtual } from '../../src/gpu/kernel.ts';
import { Plan } from '../../src/gpu/plan.ts';
import { partsOf, type Substitute, type Substitutes } from '../../src/gpu/substitutes.ts';
import { groupNormOf, layerNormOf } from '../../src/kernels/norm.ts';
import { GUARANTEED } from './capabilities.ts';

const device = await Device.open().catch((error: Error) => {
  console.log(`[substitutes] no device, all numbers are skipped: ${error.message}`);
  return undefined;
});
afterAll(() => device?.close());

const IMAGES = 4;
const ROWS = 3;
const CHANNELS = 8;

const virtual = (id: number, label: string): Virtual => ({
  kind: 'virtual',
  id,
  label,
  sizeBytes: IMAGES * ROWS * CHANNELS * 4,
});

const tensor = (name: string, current: () => GPUBuffer, offset = 0): Resident => ({
  kind: 'resident',
  label: name,
  current,
  offset,
  sizeBytes: CHANNELS * 4,
  tensor: { name, offset: 0 },
});

const nowhere = (): never => {
  throw new Error('nothing is bound here');
};

const SHAPE = { label: 'norm', images: IMAGES, channels: CHANNELS, eps: 0 };
const CAPABILITIES = { ...GUARANTEED, software: true };

/** out = norm(x) * gamma + beta, so that gamma and beta show. */
const normOf = (gamma: Resident, beta: Resident): Dispatch =>
  layerNormOf(
    { ...SHAPE, rows: ROWS, x: virtual(0, 'x'), gamma, beta, out: virtual(1, 'out') },
    CAPABILITIES,
  );

/** The same over all tokens and channels of an image. */
const groupNormsOf = (gamma: Resident, beta: Resident): readonly Dispatch[] => {
  const tensors = { x: virtual(0, 'x'), moments: virtual(2, 'moments'), out: virtual(1, 'out') };
  return groupNormOf(
    { ...SHAPE, tokens: ROWS, groups: 1, silu: false, ...tensors, gamma, beta },
    CAPABILITIES,
  );
};

const standIn = (id: number): Substitute => ({ id, current: nowhere, ready: () => {} });

describe('a dispatch with substitutes', () => {
  const dispatch = normOf(tensor('gamma', nowhere), tensor('beta', nowhere));
  const cut = (substitutes: Substitutes) =>
    partsOf(dispatch, substitutes)?.map((part) => [
      part.image0,
      part.images,
      [...part.substitutes].map(([name, { id }]) => `${name}=${id}`).join(),
    ]);
  const [a, b] = [standIn(1), standIn(2)];

  test('stays whole where it binds none of the tensors', () => {
    expect(cut(new Map())).toBeUndefined();
    expect(cut(new Map([['other', [a, a, a, a]]]))).toBeUndefined();
  });

  test('is cut between images that bind different ones, and nowhere else', () => {
    expect(cut(new Map([['gamma', [a, a, a, a]]]))).toEqual([[0, 4, 'gamma=1']]);
    expect(cut(new Map([['gamma', [undefined, a, a, undefined]]]))).toEqual([
      [0, 1, ''],
      [1, 2, 'gamma=1'],
      [3, 1, ''],
    ]);
    expect(
      cut(
        new Map([
          ['gamma', [a, b, b, b]],
          ['beta', [undefined, a, a, b]],
        ]),
      ),
    ).toEqual([
      [0, 1, 'gamma=1'],
      [1, 2, 'gamma=2,beta=1'],
      [3, 1, 'gamma=2,beta=2'],
    ]);
  });

  test('is not cut where it does not count images', () => {
    const { imageAxis: _, ...whole } = dispatch;
    expect(partsOf(whole, new Map([['gamma', [a, b, a, b]]]))).toBeUndefined();
  });
});

describe.skipIf(!device)('software rung: a plan with substitutes', () => {
  const vector = (value: number, offsetBytes = 0): GPUBuffer => {
    const buffer = device!.createBuffer('vector', offsetBytes + CHANNELS * 4, Usage.STORAGE | Usage.COPY_DST);
    device!.gpu.queue.writeBuffer(buffer, offsetBytes, new Float32Array(CHANNELS).fill(value));
    return buffer;
  };

  test.each([
    ['layer norm', (gamma: Resident, beta: Resident) => [normOf(gamma, beta)]],
    ['group norm', groupNormsOf],
  ])(
    'of a %s binds them for their images alone, made before use, and the tensors themselves at the next run',
    async (_, dispatchesOf) => {
      // Vectors of a model lie side by side in one buffer; what stands in for one starts at its own.
      const [ones, tens] = [vector(1), vector(10, 256)];
      const dispatches = dispatchesOf(
        tensor('gamma', () => ones),
        tensor('beta', () => tens, 256),
      );
      const arena = new Arena(device!, 'arena');
      const plan = await Plan.compile(device!, arena, {
        label: 'norms',
        storage: 'f32',
        steps: dispatches.map((dispatch) => ({ kind: 'always', dispatch })),
        feeds: [virtual(0, 'x')],
        results: [virtual(1, 'out')],
      });
      await arena.ensure(plan.arenaBytes);
      // Rows of -1 and 1 in turn are their own norm.
      plan.write(
        virtual(0, 'x'),
        new Uint8Array(
          Float32Array.from({ length: IMAGES * ROWS * CHANNELS }, (_, i) => (i % 2 ? 1 : -1)).buffer,
        ),
      );
      const made: number[] = [];
      const real = (id: number, buffer: GPUBuffer): Substitute => ({
        id,
        current: () => buffer,
        ready: () => made.push(id),
      });
      const [three, five] = [real(3, vector(3)), real(5, vector(5))];
      const run = async (substitutes: Substitutes): Promise<readonly number[]> => {
        const bytes = await device!.guarded('run', async () => {
          const encoder = device!.gpu.createCommandEncoder();
          plan.encode(encoder, { substitutes });
          device!.gpu.queue.submit([encoder.finish()]);
          return await device!.read(
            arena.buffer,
            plan.offsetOf(virtual(1, 'out')),
            IMAGES * ROWS * CHANNELS * 4,
          );
        });
        const out = new Float32Array(bytes.buffer);
        // The last value of each image is gamma + beta.
        return Array.from({ length: IMAGES }, (_, image) =>
          Math.round(out[(image + 1) * ROWS * CHANNELS - 1]!),
        );
      };
      expect(await run(new Map())).toEqual([11, 11, 11, 11]);
      const mixed: Substitutes = new Map([
        ['gamma', [undefined, three, five, undefined]],
        ['beta', [undefined, undefined, five, five]],
      ]);
      expect(await run(mixed)).toEqual([11, 13, 10, 6]);
      expect(made).toEqual([3, 5, 5, 5]);
      expect(await run(mixed)).toEqual([11, 13, 10, 6]);
      expect(await run(new Map([['gamma', [five, five, three, three]]]))).toEqual([15, 15, 13, 13]);
      expect(await run(new Map())).toEqual([11, 11, 11, 11]);
      device!.check();
      plan.close();
      arena.close();
    },
  );
});
