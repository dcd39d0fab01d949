/** Rung `software`: what models and forwards cost in memory, of the GPU and of the process. No timing. */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, test } from 'vitest';
import { Engine } from '../../src/engine/engine.ts';
import { ARCHITECTURES, readFixture } from '../fixtures/fixture.ts';
import { elementCount, type Manifest, type StoredDtype } from '../fixtures/weights.ts';
import type { Look, Seen, Task } from './memory.child.ts';
import { loraFile, modelFile, rowsOfCase, sourceOf, temporaryFolder } from './setting.ts';

const MB = 1e6;
const [folder, remove] = temporaryFolder();
const fixture = readFixture('sd1');
afterAll(remove);

/** Runs a task in a process of its own. */
async function measure(task: Task): Promise<Seen> {
  const child = fork(fileURLToPath(new URL('memory.child.ts', import.meta.url)), {
    execArgv: ['--import', 'tsx', '--expose-gc'],
    serialization: 'advanced',
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  });
  child.send(task);
  const [answer] = (await once(child, 'message')) as [{ seen?: Seen; error?: string }];
  if (!answer.seen) throw new Error(answer.error);
  return answer.seen;
}

/** The manifest of the sd1 fixture with every width `factor` times as large. */
const widened = (factor: number): Manifest =>
  Object.fromEntries(
    Object.entries(fixture.metadata.tensors).map(([name, shape]) => [
      name,
      shape.map((size) => (size >= 32 ? size * factor : size)),
    ]),
  );

/** Writes a checkpoint of zeros without writing them: a file with a hole. Returns the bytes of its tensors. */
function hollowCheckpoint(path: string, manifest: Manifest, dtype: StoredDtype): number {
  let offset = 0;
  const entries = Object.entries(manifest).map(([name, shape]) => {
    const begin = offset;
    offset += elementCount(shape) * (dtype === 'F32' ? 4 : 2);
    return [name, { dtype, shape, data_offsets: [begin, offset] }] as const;
  });
  const json = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  const file = openSync(path, 'w');
  writeSync(file, length);
  writeSync(file, json);
  ftruncateSync(file, 8 + json.length + offset);
  closeSync(file);
  return offset;
}

const mb = (bytes: number): string => (bytes / MB).toFixed(0);
const rss = (look: Look): string => `${mb(look.rss)} (most ${mb(look.peakRss)})`;

describe('memory of a model (software)', () => {
  test.each([
    ['F16', 'f16'],
    ['F32', 'f16'],
    ['F16', 'f32'],
  ] as const)(
    'loading a large checkpoint of %s as %s takes its weights and less than 500 MB',
    async (dtype, storage) => {
      const manifest = widened(6);
      const model = sourceOf(folder, 'large');
      const fileBytes = hollowCheckpoint(model.path, manifest, dtype);
      const tensorBytes = (fileBytes / (dtype === 'F32' ? 4 : 2)) * (storage === 'f32' ? 4 : 2);
      const { idle, loaded } = await measure({
        model,
        storage,
        loras: [],
        requests: [],
        warmUp: 0,
        forwards: 0,
      });
      const { weightBytes } = loaded.memory;
      console.log(
        `${mb(fileBytes)} MB of ${dtype} as ${storage}: weights ${mb(weightBytes)} MB, ` +
          `${(weightBytes / tensorBytes).toFixed(4)} of the tensors; RSS idle ${rss(idle)}, loaded ${rss(loaded)} MB`,
      );
      expect(weightBytes / tensorBytes).toBeLessThan(1.03);
      expect(loaded.peakRss).toBeLessThan(weightBytes + 500 * MB);
    },
  );

  test('fifty forwards after the first ten leave nothing behind', async () => {
    const model = modelFile(folder, fixture, 'small');
    const loras = ['style', 'locon', 'subject', 'peft'].map((name) => loraFile(folder, fixture, name));
    const requests = [
      ...rowsOfCase(fixture, 'base'),
      ...rowsOfCase(fixture, 'lora/style'),
      ...rowsOfCase(fixture, 'lora/stack'),
      ...rowsOfCase(fixture, 'control'),
      ...rowsOfCase(fixture, 'odd'),
    ];
    const { loaded, warm, after } = await measure({
      model,
      storage: 'f16',
      loras,
      requests,
      warmUp: 10,
      forwards: 50,
    });
    console.log(`RSS loaded ${rss(loaded)}, after 10 forwards ${rss(warm)}, after 60 ${rss(after)} MB`);
    expect(after.memory).toEqual(warm.memory);
    expect(after.rss - warm.rss).toBeLessThan(8 * MB);
  });
});

describe('a UNet on the GPU (software)', () => {
  test.each(ARCHITECTURES)(
    'of %s takes at most 3 percent more than its tensors in f16, and in q8_0 little more than half',
    async (name) => {
      const { metadata } = readFixture(name);
      const engine = await Engine.create();
      const model = sourceOf(folder, name);
      hollowCheckpoint(model.path, metadata.tensors, 'F16');
      const { sizeBytes } = await engine.loadModel(model, 'f16');
      const quantised = await engine.loadModel(model, 'q8_0');
      const { memory } = await engine.stats();
      await engine.close();
      expect(sizeBytes / (metadata.parameters * 2)).toBeLessThan(1.03);
      expect(quantised.sizeBytes / sizeBytes).toBeLessThan(0.62);
      expect(memory.weightBytes).toBe(quantised.sizeBytes);
    },
  );
});
