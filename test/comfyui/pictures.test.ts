/** On the real ComfyUI: one workflow with the stock loader and with ours gives the same latents and the same pictures. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { distances, expectSame, expectVisiblyDifferent } from './agree.ts';
import { CASES, type Case } from './cases.ts';
import { ComfyUI, type Result, VERSIONS } from './comfyui.ts';
import { contrast } from './pictures.ts';
import { UnetdServer } from './server.ts';
import { build, local, remote } from './workflow.ts';

let server: UnetdServer;
beforeAll(async () => {
  server = await UnetdServer.start();
});
afterAll(() => server.close());

describe.each(VERSIONS)('ComfyUI %s', (version) => {
  let comfyui: ComfyUI;
  const locals = new Map<string, Promise<Result>>();
  const worst = { latent: 0, picture: 0 };

  beforeAll(async () => {
    comfyui = await ComfyUI.start(version);
  });
  afterAll(async () => {
    await comfyui.close();
    console.log(
      `ComfyUI ${version}: worst latent ${worst.latent.toExponential(1)}, picture ${worst.picture}`,
    );
  });

  /** The workflow on ComfyUI's own UNet, run once. */
  function reference(each: Case): Promise<Result> {
    const held = locals.get(each.name) ?? comfyui.run(build(each, local));
    locals.set(each.name, held);
    return held;
  }

  test.each(CASES)('$name', async (each) => {
    const expected = await reference(each);
    checkReference(each, expected);
    if (each.unlike !== undefined) {
      const other = CASES.find(({ name }) => name === each.unlike)!;
      expectVisiblyDifferent(expected, await reference(other));
    }

    const before = (await server.stats()).forwards.completed;
    const got = await comfyui.run(build(each, remote(server.url)));
    const forwards = (await server.stats()).forwards.completed - before;
    expect(forwards, 'forwards on the server').toBeGreaterThanOrEqual(expected.progress.length);
    expect(got.progress).toEqual(expected.progress);
    expect(got.previews).toBe(expected.previews);

    const { latent, picture } = distances(got, expected);
    worst.latent = Math.max(worst.latent, latent);
    worst.picture = Math.max(worst.picture, picture);
    expectSame(got, expected);
  });
});

/** A picture that is grey or saturated would hide differences. */
function checkReference({ batch = 1, sampling }: Case, result: Result): void {
  const { pictures, latents, progress, previews } = result;
  const steps = sampling?.steps ?? 4;
  expect(progress).toEqual(Array.from({ length: steps }, (_, index) => index + 1));
  expect(previews).toBeGreaterThan(0);
  expect(latents.map(({ shape }) => shape[0])).toEqual([batch]);
  expect(pictures.length).toBe(batch);
  for (const picture of pictures) {
    const { std, saturated } = contrast(picture);
    expect(std).toBeGreaterThan(15);
    expect(saturated).toBeLessThan(0.25);
  }
}
