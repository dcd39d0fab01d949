/** The example workflows, opened in ComfyUI's own front end: nothing is missing, nothing changes, and a picture comes out. */
import { randomUUID } from 'node:crypto';
import { linkSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { ROOT } from '../launch.ts';
import { ComfyUI } from './comfyui.ts';
import { FrontEnd, PACKAGES, type SavedNode, type SavedWorkflow } from './front-end.ts';
import { contrast, type Picture, readPicture } from './pictures.ts';
import { MODELS, UnetdServer } from './server.ts';
import { FAMILIES } from './workflow.ts';

const FOLDER = `${ROOT}comfyui/examples/`;
const NAMES = readdirSync(FOLDER).sort();
const LOADER = 'UnetdLoadCheckpoint';
/** A node of the front end, which ComfyUI does not know. */
const NOTE = 'MarkdownNote';
const TITLE_HEIGHT = 30;
const STEPS = 2;

/** The files that the examples name, and the small ones that take their places. */
const FILES: Readonly<Record<string, string>> = {
  'checkpoints/v1-5-pruned-emaonly.safetensors': 'checkpoints/sd15-whole.safetensors',
  'checkpoints/sd-v1-5-inpainting.safetensors': 'checkpoints/sd15-inpaint-whole.safetensors',
  'checkpoints/sd_xl_base_1.0.safetensors': 'checkpoints/sdxl-whole.safetensors',
  'controlnet/control_v11p_sd15_canny_fp16.safetensors': 'controlnet/sd15.safetensors',
  'loras/blindbox_V1Mix.safetensors': 'loras/sd15-style-and-text.safetensors',
  'loras/MoXinV1.safetensors': 'loras/sd15-subject.safetensors',
  'loras/sd_xl_offset_example-lora_1.0.safetensors': 'loras/sdxl-style.safetensors',
};

let place: string;
let server: UnetdServer;
let comfyui: ComfyUI;
let front: FrontEnd;

beforeAll(async () => {
  // Hard links: the server follows no symbolic one out of its folders. So on the file system of the models.
  place = mkdtempSync(join(MODELS, '../examples-'));
  for (const [name, file] of Object.entries(FILES)) {
    mkdirSync(dirname(join(place, name)), { recursive: true });
    linkSync(join(MODELS, file), join(place, name));
  }
  server = await UnetdServer.start(place);
  const environment = { UNETD_URL: server.url };
  comfyui = await ComfyUI.start('0.3.75', { environment, models: place, packages: PACKAGES });
  front = await FrontEnd.open(comfyui.url);
});
// A dialog of one test is nothing of the next.
afterEach(() => front.page.keyboard.press('Escape'));
afterAll(async () => {
  await front?.close();
  await comfyui?.close();
  await server?.close();
  rmSync(place, { recursive: true, force: true });
});

test('there is one for each case, and ComfyUI offers them among its templates', async () => {
  expect(NAMES).toEqual(['controlnet.json', 'inpaint.json', 'sdxl.json', 'txt2img-loras.json']);
  const templates = await (await fetch(`${comfyui.url}/workflow_templates`)).json();
  expect(templates).toEqual({
    unetd: expect.arrayContaining(NAMES.map((name) => name.replace('.json', ''))),
  });
});

describe.each(NAMES)('%s', (name) => {
  const saved = JSON.parse(readFileSync(FOLDER + name, 'utf8')) as SavedWorkflow;
  const { nodes, links } = saved;

  test('runs from left to right, and no node lies on another', () => {
    const byId = new Map(nodes.map((node) => [node.id, node]));
    const linked = links.map(([, from, , to]) => [byId.get(from)!, byId.get(to)!] as const);
    expect(linked.filter(([from, to]) => right(from) >= to.pos[0])).toEqual([]);
    const pairs = nodes.flatMap((one, index) => nodes.slice(index + 1).map((other) => [one, other] as const));
    expect(pairs.filter(([one, other]) => overlap(one, other))).toEqual([]);
  });

  test('has stock nodes but for the loader', async () => {
    const used = [...new Set(nodes.map(({ type }) => type))].filter((type) => type !== NOTE);
    const infos = await Promise.all(used.map((type) => comfyui.nodeInfo(type)));
    const foreign = used.filter(
      (_, index) => infos[index]?.python_module.startsWith('custom_nodes.') !== false,
    );
    expect(foreign).toEqual([LOADER]);
    expect(nodes.some(({ type }) => type === NOTE)).toBe(true);
  });

  test('opens as it was saved, and gives a picture', async () => {
    await front.load(FOLDER + name, saved.id);
    expect(await front.complaints()).toEqual([]);
    const { workflow, output } = await front.prompt();
    // All but the part of the canvas that is in view.
    const { ds: _, ...extra } = workflow.extra;
    expect({ ...workflow, extra }).toEqual(saved);
    const loader = Object.values(output).find(({ class_type }) => class_type === LOADER)!;
    expect(loader.inputs).toMatchObject({ server: '', when_away: 'error', dtype: 'auto' });

    await front.set('EmptyLatentImage', { width: 64, height: 64 });
    await front.set('KSampler', { steps: STEPS });
    if (name === 'sdxl.json') {
      // Valid as it is, but the model is without text encoders, which would be too large for a test.
      const noText = { kind: 'error', nodeType: 'CLIPTextEncode' };
      await expect(comfyui.run(output)).rejects.toMatchObject(noText);
      await front.replace('CLIPTextEncode', 'TestConditioning');
      await front.set('TestConditioning', { width: FAMILIES.sdxl.width, pooled: FAMILIES.sdxl.pooled });
    }
    const before = await counts();
    expect(await front.run()).toEqual({ status: 200, errors: {} });
    const picture = await front.picture('SaveImage');
    expect(await front.complaints()).toEqual([]);
    expect(contrast(await fetched(picture!)).std).toBeGreaterThan(10);
    const after = await counts();
    expect(after.forwards - before.forwards).toBe(STEPS);
    const loras = nodes.filter(({ type }) => type.startsWith('LoraLoader')).length;
    expect(after.uploads - before.uploads).toBe(loras);
  });
});

test('an unknown node would have been complained about', async () => {
  const path = join(place, 'unknown.json');
  const text = readFileSync(`${FOLDER}sdxl.json`, 'utf8');
  const id = randomUUID();
  writeFileSync(path, JSON.stringify({ ...JSON.parse(text.replaceAll(LOADER, 'UnetdNoSuchNode')), id }));
  await front.load(path, id);
  expect(await front.complaints()).toEqual([expect.stringContaining('UnetdNoSuchNode')]);
});

const right = ({ pos, size }: SavedNode): number => pos[0] + size[0];
const top = ({ pos }: SavedNode): number => pos[1] - TITLE_HEIGHT;
const bottom = ({ pos, size }: SavedNode): number => pos[1] + size[1];

function overlap(a: SavedNode, b: SavedNode): boolean {
  return a.pos[0] < right(b) && b.pos[0] < right(a) && top(a) < bottom(b) && top(b) < bottom(a);
}

async function counts(): Promise<{ readonly forwards: number; readonly uploads: number }> {
  return { forwards: await server.requests('forward'), uploads: await server.requests('lora.put') };
}

async function fetched(url: string): Promise<Picture> {
  return readPicture(Buffer.from(await (await fetch(url)).arrayBuffer()));
}
