/**
 * The process that `memory.test.ts` measures: loads one model, runs forwards, sends what it saw. On its own so that the
 * memory is its own; on a software adapter that is the GPU's memory too.
 */
import { Engine } from '../../src/engine/engine.ts';
import type { EngineStats, FileSource, StepRequest, StorageDtype } from '../../src/engine/types.ts';

export interface Task {
  readonly model: FileSource;
  readonly storage: StorageDtype;
  readonly loras: readonly FileSource[];
  readonly requests: readonly StepRequest[];
  /** Forwards before the first look, and between that and the second. */
  readonly warmUp: number;
  readonly forwards: number;
}

export interface Look {
  /** Resident bytes of the process after a garbage collection, and the most it ever had. */
  readonly rss: number;
  readonly peakRss: number;
  readonly memory: EngineStats['memory'];
}

export interface Seen {
  readonly idle: Look;
  readonly loaded: Look;
  readonly warm: Look;
  readonly after: Look;
}

async function look(engine: Engine): Promise<Look> {
  // Twice: what the first one finalises, the second one frees.
  for (let i = 0; i < 2; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const { memory } = await engine.stats();
  return { rss: process.memoryUsage.rss(), peakRss: process.resourceUsage().maxRSS * 1024, memory };
}

async function main({ model, storage, loras, requests, warmUp, forwards }: Task): Promise<Seen> {
  const engine = await Engine.create();
  const idle = await look(engine);
  await engine.loadModel(model, storage);
  for (const lora of loras) await engine.loadAdapter(lora, model.name);
  const loaded = await look(engine);
  const run = async (count: number): Promise<void> => {
    for (let i = 0; i < count; i++)
      await engine.forward({ model: model.name, requests: [requests[i % requests.length]!] });
  };
  await run(warmUp);
  const warm = await look(engine);
  await run(forwards);
  const after = await look(engine);
  await engine.close();
  return { idle, loaded, warm, after };
}

process.once('message', (task: Task) => {
  void main(task).then(
    (seen) => process.send?.({ seen }, () => process.disconnect()),
    (error: unknown) => process.send?.({ error: String(error) }, () => process.disconnect()),
  );
});
