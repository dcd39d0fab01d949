/** On the real ComfyUI: servers that die, users who lose patience, and workflows that cannot run remotely. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { freePort } from '../launch.ts';
import { expectSame } from './agree.ts';
import { lora } from './cases.ts';
import { ComfyUI, type Result, VERSIONS, WorkflowError } from './comfyui.ts';
import { latentDistance } from './pictures.ts';
import { UnetdServer } from './server.ts';
import { build, local, type Recipe, remote } from './workflow.ts';

const STEPS = 8;

/** Long enough to be cut short. */
const RECIPE: Recipe = {
  model: 'sd15',
  sampling: { steps: STEPS, sampler_name: 'dpmpp_2m_sde' },
  change: (stage) => lora(stage, 'sd15-style', 1),
};

interface Refused {
  readonly nodeType: string;
  /** As the user sees the node. */
  readonly name: string;
  readonly inputs: Readonly<Record<string, number>>;
}

const REFUSED: readonly Refused[] = [
  { nodeType: 'FreeU_V2', name: 'FreeU_V2', inputs: { b1: 1.3, b2: 1.4, s1: 0.9, s2: 0.2 } },
  { nodeType: 'PerturbedAttentionGuidance', name: 'PerturbedAttentionGuidance', inputs: { scale: 3 } },
  {
    nodeType: 'SelfAttentionGuidance',
    name: 'Self-Attention Guidance',
    inputs: { scale: 0.5, blur_sigma: 2 },
  },
  {
    nodeType: 'HyperTile',
    name: 'HyperTile',
    inputs: { tile_size: 256, swap_size: 2, max_depth: 0, scale_depth: 0 },
  },
  { nodeType: 'TomePatchModel', name: 'TomePatchModel', inputs: { ratio: 0.3 } },
];

/** The error that a workflow ends with. */
async function failure(done: Promise<Result>): Promise<WorkflowError> {
  const error = await done.then(
    () => new Error('The workflow finished.'),
    (reason: unknown) => reason,
  );
  if (error instanceof WorkflowError) return error;
  throw error;
}

describe.each(VERSIONS)('ComfyUI %s', (version) => {
  let server: UnetdServer;
  let comfyui: ComfyUI;
  let expected: Result;
  /** Where nothing listens. */
  let nobody: string;

  beforeAll(async () => {
    server = await UnetdServer.start();
    comfyui = await ComfyUI.start(version);
    expected = await comfyui.run(build(RECIPE, local));
    nobody = `ws://127.0.0.1:${await freePort()}/v1`;
  });
  afterAll(async () => {
    await comfyui.close();
    await server.close();
  });

  test.each(REFUSED)('refuses $nodeType before anything is sent', async ({ nodeType, name, inputs }) => {
    const change: Recipe['change'] = (stage) => {
      stage.model = stage.workflow.add(nodeType, { ...inputs, model: stage.model })(0);
    };
    const forwards = await server.requests('forward');
    const error = await failure(comfyui.run(build({ model: 'sd15', change }, remote(server.url))));
    expect(error.kind).toBe('error');
    expect(error.message).toContain(name);
    expect(error.message).toMatch(/bypass|locally/);
    expect(await server.requests('forward')).toBe(forwards);
  });

  test('is answered at once when the user interrupts a long step, and the server drops the work', async () => {
    const long: Recipe = { model: 'sd15', width: 128, height: 128, batch: 2 };
    const job = await comfyui.submit(build(long, remote(server.url)));
    await comfyui.child.until('the server worked', 60_000, async () =>
      (await server.stats()).queue.running > 0 ? true : undefined,
    );
    const before = (await server.stats()).forwards;
    const started = performance.now();
    void comfyui.interrupt();
    const error = await failure(job.done);
    const elapsed = performance.now() - started;
    console.log(`ComfyUI ${version}: interrupted after ${elapsed.toFixed(0)} ms`);
    expect(error.kind).toBe('interrupted');
    expect(elapsed).toBeLessThan(200);

    await comfyui.child.until('the server was idle', 60_000, async () => {
      const { queue } = await server.stats();
      return queue.requests + queue.running === 0 ? true : undefined;
    });
    const after = (await server.stats()).forwards;
    expect(after.cancelled).toBe(before.cancelled + 1);
    expect(after.completed).toBe(before.completed);
    // Nothing of it is left over for the next workflow.
    expectSame(await comfyui.run(build(RECIPE, remote(server.url))), expected);
  });

  test('waits for a server that was killed while sampling, and ends with the same picture', async () => {
    const job = await comfyui.submit(build(RECIPE, remote(server.url, 'wait')));
    await job.reached(2);
    await server.kill();
    await new Promise((resolve) => setTimeout(resolve, 1000));
    await server.restart();
    const got = await job.done;
    expect(got.progress).toEqual(expected.progress);
    expectSame(got, expected);
    // The new process has done the rest of the steps and no more.
    const { completed } = (await server.stats()).forwards;
    expect(completed).toBeGreaterThan(0);
    expect(completed).toBeLessThan(STEPS);
  });

  test('says at once that a server was lost, where it should not wait', async () => {
    const job = await comfyui.submit(build(RECIPE, remote(`127.0.0.1:${server.port}`)));
    await job.reached(2);
    const started = performance.now();
    await server.kill();
    const error = await failure(job.done);
    const elapsed = performance.now() - started;
    await server.restart();
    console.log(`ComfyUI ${version}: after ${(elapsed / 1000).toFixed(1)} s: ${error.message}`);
    expect(error.kind).toBe('error');
    expect(error.message).toContain(server.url);
    expect(elapsed).toBeLessThan(5000);
  });

  test('says at once that there is no server', async () => {
    const started = performance.now();
    const error = await failure(comfyui.run(build({ model: 'sd15' }, remote(nobody))));
    expect(error.nodeType).toBe('UnetdLoadCheckpoint');
    expect(error.message).toContain(nobody);
    expect(performance.now() - started).toBeLessThan(5000);
  });

  test('can be interrupted while it waits for a server', async () => {
    const job = await comfyui.submit(build({ model: 'sd15' }, remote(nobody, 'wait')));
    await new Promise((resolve) => setTimeout(resolve, 2000));
    void comfyui.interrupt();
    expect((await failure(job.done)).kind).toBe('interrupted');
  });

  test('loads the model locally where no server is there and it may', async () => {
    const got = await comfyui.run(build(RECIPE, remote(nobody, 'local')));
    expect(latentDistance(got.latents[0]!, expected.latents[0]!)).toBe(0);
  });

  test('takes the next server where the first is away', async () => {
    const { completed } = (await server.stats()).forwards;
    expectSame(await comfyui.run(build(RECIPE, remote(`${nobody}, ${server.url}`))), expected);
    expect((await server.stats()).forwards.completed).toBe(completed + STEPS);
  });
});
