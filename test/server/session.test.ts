/** One connection without a socket: whatever comes in, every request is answered exactly once and nothing breaks. */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { SYSTEM_CLOCK } from '../../src/server/clock.ts';
import { KeptTensors } from '../../src/server/kept.ts';
import { Library } from '../../src/server/library.ts';
import { Metrics } from '../../src/server/metrics.ts';
import type { Services } from '../../src/server/operations.ts';
import { OPERATIONS } from '../../src/server/protocol.ts';
import { Residents } from '../../src/server/residents.ts';
import { Scheduler } from '../../src/server/scheduler.ts';
import { Session } from '../../src/server/session.ts';
import { decodeFrame, encodeBinary, encodeText } from '../../src/server/wire.ts';
import { comfyPlace, filled, type Place, SILENT, tensor } from './setting.ts';
import { StandInEngine } from './stand-in-engine.ts';

let place: Place;
let services: Services;
let library: Library;

beforeAll(async () => {
  place = comfyPlace();
  const engine = new StandInEngine();
  library = await Library.open({ models: [place.dir], loras: [], uploadQuotaBytes: 1e6 });
  const metrics = new Metrics();
  const residents = new Residents(engine, library, SYSTEM_CLOCK, 'auto');
  const options = { maxBatch: 4, batchWaitMs: 0, queueLimit: 100 };
  const scheduler = new Scheduler(engine, residents, metrics, SYSTEM_CLOCK, options);
  const stats = (): never => {
    throw new Error('statistics are broken in this test');
  };
  services = { library, residents, scheduler, metrics, log: SILENT, stats, isDraining: () => false };
});

afterAll(async () => {
  await library.close();
  place.remove();
});

/** What a session answers to these frames, all sent at once. */
async function answersTo(frames: readonly (string | Uint8Array)[]): Promise<{ id: unknown; code: string }[]> {
  const answers: { id: unknown; code: string }[] = [];
  const limits = { maxMessageBytes: 1e6, maxInFlight: 1000, maxKeptBytes: 1e6 };
  const session = new Session('me', services, limits, { limitBytes: 1e6, usedBytes: 0 }, (frame) => {
    const { header } = decodeFrame(frame, 'res');
    if (header.event === undefined) {
      const code = header.ok === true ? 'ok' : (header.error as { code: string }).code;
      answers.push({ id: header.id, code });
    }
  });
  for (const frame of frames) session.receive(frame);
  await session.idle();
  session.close();
  return answers;
}

const VALUES = fc.oneof(
  fc.constantFrom('fast.safetensors', 'double.safetensors', 'auto', 'sha256:', 'x', '', '..', '0'.repeat(64)),
  fc.jsonValue({ maxDepth: 3 }),
);

describe('a session', () => {
  it('answers every request once, whatever its fields', async () => {
    const fields = fc.dictionary(
      fc.constantFrom(
        'model',
        'lora',
        'loras',
        'dtype',
        'values',
        'digests',
        'digest',
        'part',
        'parts',
        'keep',
        'reuse',
        'control',
        'target',
      ),
      VALUES,
    );
    const request = fc.record({
      op: fc.oneof(fc.constantFrom(...Object.keys(OPERATIONS)), fc.string()),
      fields,
      binary: fc.boolean(),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(request, { maxLength: 8 }), async (requests) => {
        const frames = requests.map(({ op, fields: own, binary }, index) => {
          const header = { ...own, id: `r${index}`, op };
          const kind = (OPERATIONS as Record<string, string>)[op] ?? (binary ? 'binary' : 'text');
          return kind === 'binary' ? encodeBinary(header, [tensor('x', [1])], 'req') : encodeText(header);
        });
        const answers = await answersTo(frames);
        expect(answers.map(({ id }) => id).sort()).toEqual(requests.map((_, index) => `r${index}`).sort());
        for (const { code } of answers)
          if (code === 'ERR_INTERNAL') expect(requests.map(({ op }) => op)).toContain('stats');
      }),
      { numRuns: 300 },
    );
  });

  it('reports a defect as ERR_INTERNAL and goes on', async () => {
    const frames = [encodeText({ id: '1', op: 'stats' }), encodeText({ id: '2', op: 'loras.list' })];
    expect(await answersTo(frames)).toEqual([
      { id: '1', code: 'ERR_INTERNAL' },
      { id: '2', code: 'ok' },
    ]);
  });

  it('lets a reuse follow its keep at once', async () => {
    const views = Object.entries({ x: filled([1, 4, 2, 2]), timesteps: filled([1]) }).map(
      ([name, value]) => ({ name, ...value }),
    );
    const context = { name: 'context', ...filled([1, 3, 6]) };
    const header = { op: 'forward', model: 'fast.safetensors' };
    const answers = await answersTo([
      encodeBinary({ ...header, id: '1', keep: { context: 'k' } }, [...views, context], 'req'),
      encodeBinary({ ...header, id: '2', reuse: { context: 'k' } }, views, 'req'),
    ]);
    expect(answers.map(({ code }) => code)).toEqual(['ok', 'ok']);
  });
});

describe('kept tensors', () => {
  it('stay within their limit and keep what was used last', () => {
    const actions = fc.array(
      fc.record({ key: fc.constantFrom('a', 'b', 'c', 'd'), bytes: fc.nat(12), set: fc.boolean() }),
    );
    fc.assert(
      fc.property(actions, (steps) => {
        const kept = new KeptTensors(40, { limitBytes: 1000, usedBytes: 0 });
        const order: { key: string; bytes: number }[] = [];
        for (const { key, bytes, set } of steps) {
          const held = order.findIndex((each) => each.key === key);
          const entry = set ? { key, bytes: bytes * 4 } : order[held];
          if (held >= 0) order.splice(held, 1);
          if (set) kept.set(key, tensor(key, new Array(bytes).fill(1)));
          else expect(kept.get(key)?.data.byteLength).toBe(entry?.bytes);
          if (entry === undefined || entry.bytes > 40) continue;
          order.push(entry);
          while (order.reduce((sum, each) => sum + each.bytes, 0) > 40) order.shift();
        }
        expect(kept.size).toBe(order.length);
        expect(kept.bytes).toBe(order.reduce((sum, each) => sum + each.bytes, 0));
      }),
    );
  });

  it('are copies of their own', () => {
    const kept = new KeptTensors(100, { limitBytes: 100, usedBytes: 0 });
    const frame = Buffer.from([1, 2, 3, 4]);
    kept.set('k', { name: 't', dtype: 'F32', shape: [1], data: frame });
    frame.fill(0);
    expect([...kept.get('k')!.data]).toEqual([1, 2, 3, 4]);
  });
});
