/** On the real ComfyUI: what a client process holds, and what several of them share on one server. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { expectSame, expectVisiblyDifferent } from './agree.ts';
import { lora } from './cases.ts';
import { ComfyUI, VERSIONS } from './comfyui.ts';
import { UnetdServer } from './server.ts';
import { build, type Loader, local, type Prompt, remote, Workflow } from './workflow.ts';

const MB = 1e6;

function withLora(load: Loader, name: string, strength: number): Prompt {
  return build({ model: 'sd15', change: (stage) => lora(stage, name, strength) }, load);
}

function status(server: string): Prompt {
  const workflow = new Workflow();
  workflow.add('UnetdServerStatus', { server });
  return workflow.prompt;
}

describe.each(VERSIONS)('ComfyUI %s', (version) => {
  let server: UnetdServer;
  let first: ComfyUI;
  let second: ComfyUI;

  beforeAll(async () => {
    server = await UnetdServer.start();
    first = await ComfyUI.start(version, { environment: { UNETD_URL: server.url } });
    second = await ComfyUI.start(version);
  });
  afterAll(async () => {
    await first.close();
    await second.close();
    await server.close();
  });

  test('holds no weights of a UNet of 860 million parameters', async () => {
    const idle = second.child.memory();
    const full = build({ model: 'sd15-full', sampling: { steps: 2, cfg: 1 } }, remote(server.url));
    expect((await second.run(full)).progress).toEqual([1, 2]);
    const used = second.child.memory();
    console.log(
      `ComfyUI ${version}: idle ${(idle.now / MB).toFixed(0)} MB, after sampling with a remote UNet of 860 M ` +
        `${(used.now / MB).toFixed(0)} MB, at most ${(used.peak / MB).toFixed(0)} MB`,
    );
    const model = (await server.stats()).engine.models.find(({ model }) => model === 'sd15-full.safetensors');
    expect(model?.sizeBytes).toBeGreaterThan(859e6 * 4);
    expect(used.now - idle.now).toBeLessThan(150 * MB);
    expect(used.peak - idle.now).toBeLessThan(300 * MB);
  });

  test('lists the models of the server in the dropdown', async () => {
    const info = await first.nodeInfo('UnetdLoadCheckpoint');
    expect(info?.input.required.model?.[0]).toContain('sd15.safetensors');
    expect(info?.input.required.model?.[0]).not.toContain('sd15-style.safetensors');
  });

  test('shares one UNet between two ComfyUI processes with different LoRAs', async () => {
    const expected = [
      await first.run(withLora(local, 'sd15-style', 1)),
      await first.run(withLora(local, 'sd15-subject', 0.9)),
    ] as const;
    expectVisiblyDifferent(expected[0], expected[1]);
    const { turnover } = (await server.stats()).engine;
    const got = await Promise.all([
      first.run(withLora(remote(server.url), 'sd15-style', 1)),
      second.run(withLora(remote(server.url), 'sd15-subject', 0.9)),
    ]);
    expectSame(got[0], expected[0]);
    expectSame(got[1], expected[1]);

    const { engine } = await server.stats();
    const shared = engine.models.filter(({ model }) => model === 'sd15.safetensors');
    expect(shared.length).toBe(1);
    expect(shared[0]?.adapters.length).toBe(2);
    expect(engine.turnover.modelLoads - turnover.modelLoads).toBe(1);
    expect(engine.memory.weightBytes).toBe(engine.models.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0));
  });

  test('uploads nothing for another strength of a LoRA, nor for a stack of known ones', async () => {
    const uploads = async (): Promise<number> => await server.requests('lora.put');
    const before = await uploads();
    expect(before).toBeGreaterThan(0);
    const weaker = await first.run(withLora(remote(server.url), 'sd15-style', 0.4));
    expect(await uploads()).toBe(before);
    expectSame(weaker, await first.run(withLora(local, 'sd15-style', 0.4)));
    // Uploaded by the other process.
    await first.run(withLora(remote(server.url), 'sd15-subject', -0.3));
    expect(await uploads()).toBe(before);
    // One that the server has not seen yet does count.
    await first.run(withLora(remote(server.url), 'sd15-peft', 1));
    expect(await uploads()).toBeGreaterThan(before);
  });

  test('tells what a server does', async () => {
    const { engine } = await server.stats();
    const [text] = (await first.run(status(server.url))).texts;
    expect(text).toContain(engine.device.name);
    for (const { model } of engine.models) expect(text).toContain(model);
    // From the environment.
    expect((await first.run(status(''))).texts[0]).toContain(server.url);
  });
});
