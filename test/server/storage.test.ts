/** Who asked for a model in a dtype of their choice has it in that, whatever others ask for, let go, or whatever makes room. */
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Client } from '../../src/client.ts';
import type { StorageDtype } from '../../src/engine/types.ts';
import { SYSTEM_CLOCK } from '../../src/server/clock.ts';
import { Library } from '../../src/server/library.ts';
import { Residents } from '../../src/server/residents.ts';
import { comfyPlace, modelFile, openStage, type Place, request, type Stage } from './setting.ts';
import { StandInEngine } from './stand-in-engine.ts';

const MODEL = 'fast.safetensors';

let place: Place;

beforeEach(() => {
  place = comfyPlace();
});

afterEach(() => place.remove());

describe('a model that was asked for in a dtype', () => {
  let stage: Stage;
  let first: Client;
  let second: Client;

  beforeEach(async () => {
    stage = await openStage(place);
    [first, second] = [await stage.connect(), await stage.connect()];
  });

  afterEach(() => stage.end());

  const stored = async (): Promise<StorageDtype | undefined> => (await stage.engine.stats()).models[0]?.dtype;

  it('stays so for others too, who are told why, until the connection ends', async () => {
    await first.modelLoad(MODEL, { dtype: 'f32' });
    await expect(second.modelLoad(MODEL, { dtype: 'f16' })).rejects.toMatchObject({
      code: 'ERR_MODEL_BUSY',
      message: expect.stringMatching(
        /stored as f16: another connection asked for f32\. Load it as f32 or auto/,
      ),
      details: { model: MODEL, dtype: 'f16', held: 'f32', connections: 1 },
    });
    expect((await second.modelLoad(MODEL)).dtype).toBe('f32');
    expect((await second.modelLoad(MODEL, { dtype: 'f32' })).dtype).toBe('f32');
    expect(stage.engine.loads).toEqual([MODEL]);
    // Now it is the second one's as well.
    await expect(first.modelLoad(MODEL, { dtype: 'f16' })).rejects.toMatchObject({ code: 'ERR_MODEL_BUSY' });
    await second.close();
    await expect.poll(async () => (await first.stats()).connections).toBe(1);
    expect((await first.modelLoad(MODEL, { dtype: 'f16' })).dtype).toBe('f16');
  });

  it('is loaded like that again when it made room, was unloaded by others, or has changed', async () => {
    await first.modelLoad(MODEL, { dtype: 'f32' });
    stage.engine.evictAll();
    await second.forward(request(MODEL));
    expect(await stored()).toBe('f32');
    await second.modelUnload(MODEL);
    await second.forward(request(MODEL));
    expect(await stored()).toBe('f32');
    place.write(`checkpoints/${MODEL}`, modelFile({ changed: 'yes' }));
    expect((await second.modelLoad(MODEL)).dtype).toBe('f32');
    await first.modelUnload(MODEL);
    await second.forward(request(MODEL));
    expect(await stored()).toBe('f16');
  });

  it('waits for nobody who only took it as it was', async () => {
    await first.modelLoad(MODEL);
    await first.forward(request(MODEL));
    expect((await second.modelLoad(MODEL, { dtype: 'f32' })).dtype).toBe('f32');
  });

  it('goes to the first of two who ask at the same time', async () => {
    place.write('checkpoints/long.safetensors', modelFile({ loadMs: '100' }));
    const model = 'long.safetensors';
    const [mine, theirs] = await Promise.allSettled([
      first.modelLoad(model, { dtype: 'f32' }),
      second.modelLoad(model, { dtype: 'f16' }),
    ]);
    expect([mine, theirs]).toMatchObject([
      { status: 'fulfilled', value: { dtype: 'f32' } },
      { status: 'rejected', reason: { code: 'ERR_MODEL_BUSY' } },
    ]);
  });

  it('is nobody’s where the asking connection ended before it was loaded', async () => {
    place.write('checkpoints/long.safetensors', modelFile({ loadMs: '200' }));
    const model = 'long.safetensors';
    const gone = first.modelLoad(model, { dtype: 'f32' });
    await second.models();
    await first.close();
    await expect(gone).rejects.toMatchObject({ code: 'ERR_DISCONNECTED' });
    expect((await second.modelLoad(model, { dtype: 'f16' })).dtype).toBe('f16');
  });
});

type Step =
  | { readonly kind: 'load'; readonly owner: number; readonly dtype: StorageDtype | 'auto' }
  | { readonly kind: 'cancelled' | 'unload' | 'close'; readonly owner: number }
  | { readonly kind: 'evict' };

const owner = fc.nat(3);
const STEPS: fc.Arbitrary<Step> = fc.oneof(
  fc.record({
    kind: fc.constant('load' as const),
    owner,
    dtype: fc.constantFrom('auto' as const, 'f16' as const, 'f32' as const),
  }),
  fc.record({ kind: fc.constantFrom('cancelled' as const, 'unload' as const, 'close' as const), owner }),
  fc.record({ kind: fc.constant('evict' as const) }),
);

describe('however connections load, unload and end', () => {
  it('each has the dtype that it was promised', async () => {
    const library = await Library.open({ models: [place.dir], loras: [], uploadQuotaBytes: 1e6 });
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.array(STEPS, { minLength: 1, maxLength: 4 }), { maxLength: 8 }),
        async (rounds) => {
          const engine = new StandInEngine();
          const residents = new Residents(engine, library, SYSTEM_CLOCK, 'auto');
          const promised = new Map<number, StorageDtype>();
          const run = async (step: Step): Promise<void> => {
            if (step.kind === 'evict') {
              engine.evictAll();
              return residents.forget(MODEL);
            }
            const name = String(step.owner);
            if (step.kind === 'unload') {
              await residents.unloadModel(MODEL, name);
              promised.delete(step.owner);
            } else if (step.kind === 'close') {
              residents.dropOwner(name);
              promised.delete(step.owner);
            } else {
              const signal =
                step.kind === 'cancelled'
                  ? AbortSignal.abort(new Error('cancelled'))
                  : new AbortController().signal;
              const dtype = step.kind === 'load' ? step.dtype : 'f32';
              const info = await residents.loadModel(MODEL, dtype, {
                owner: name,
                signal,
                progress: () => {},
              });
              if (dtype !== 'auto' && !signal.aborted) {
                expect(info.dtype).toBe(dtype);
                promised.set(step.owner, dtype);
              }
            }
          };
          for (const steps of rounds) {
            // At the same time, but one of each connection, as what a connection does together has no order to keep.
            const apart = steps.filter(
              (step, at) =>
                step.kind === 'evict' ||
                !steps.slice(0, at).some((other) => other.kind !== 'evict' && other.owner === step.owner),
            );
            for (const result of await Promise.allSettled(apart.map(run)))
              if (result.status === 'rejected')
                expect(String(result.reason)).toMatch(/cannot be stored|not loaded|cancelled/);
            const { dtype } = await residents.needModel(MODEL);
            for (const each of promised.values()) expect(each).toBe(dtype);
          }
        },
      ),
      { numRuns: 300 },
    );
    await library.close();
  });
});
