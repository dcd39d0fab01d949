/**
 * `npm run demo`: starts `unetd serve`, runs six workflows at once against its one model, and writes a contact sheet
 * and the numbers. A client like any other; nothing here reaches into the server.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { Client, type ConnectOptions } from '../src/client.ts';
import { type Cost, type Deviation, deviations, loraCosts } from './measure.ts';
import { openProgress } from './progress.ts';
import { contextRows, readTensors } from './prompts.ts';
import { costTable, deviationTable, memoryLines, runTable } from './report.ts';
import { type Run, runWorkflow } from './run.ts';
import { startServer } from './server.ts';
import { contactSheet } from './sheet.ts';
import { MODEL, PICTURE_SHAPE, stackLabel, WORKFLOWS } from './workflows.ts';

const USAGE = `Usage: npm run demo -- [options]
  --steps N      sampler steps (default 20)
  --guidance G   classifier-free guidance scale (default 3)
  --pictures N   pictures of each workflow, 1 to 4 (default 4)
  --rounds N     timed rounds of the LoRA cost, 0 to leave it out (default 5)
  --url URL      use a running server instead of starting one; it needs the same models and LoRAs
  --token TOKEN  bearer token of that server`;

const ASSETS = fileURLToPath(new URL('./assets/', import.meta.url));
const SHEET = fileURLToPath(new URL('./out/contact-sheet.png', import.meta.url));
/** Far above what f16 storage costs (about 1e-3), far below what a wrong LoRA does (0.05 and more). */
const MAX_RELATIVE_ERROR = 0.02;

interface Options {
  readonly steps: number;
  readonly guidance: number;
  readonly pictures: number;
  readonly rounds: number;
  readonly url: string | undefined;
  readonly token: string | undefined;
}

function options(): Options | null {
  const { values } = parseArgs({
    options: {
      steps: { type: 'string', default: '20' },
      guidance: { type: 'string', default: '3' },
      pictures: { type: 'string', default: '4' },
      rounds: { type: 'string', default: '5' },
      url: { type: 'string' },
      token: { type: 'string' },
      help: { type: 'boolean', default: false },
    },
  });
  if (values.help) return null;
  const whole = (name: 'steps' | 'pictures' | 'rounds', least: number, most: number): number => {
    const value = Number(values[name]);
    if (Number.isInteger(value) && value >= least && value <= most) return value;
    throw new Error(`--${name} is ${values[name]}, expected a whole number from ${least} to ${most}`);
  };
  const guidance = Number(values.guidance);
  if (!Number.isFinite(guidance)) throw new Error(`--guidance is ${values.guidance}, expected a number`);
  return {
    steps: whole('steps', 2, 1000),
    guidance,
    pictures: whole('pictures', 1, 4),
    rounds: whole('rounds', 0, 1000),
    url: values.url,
    token: values.token,
  };
}

/** All workflows at once, with a bar each. */
async function runAll(url: string, connect: ConnectOptions, asked: Options): Promise<readonly Run[]> {
  const table = await readTensors(`${ASSETS}prompts.safetensors`);
  const workflows = WORKFLOWS.map((one) => ({ ...one, prompts: one.prompts.slice(0, asked.pictures) }));
  const progress = openProgress(
    workflows.map((one) => one.name),
    asked.steps,
  );
  try {
    return await Promise.all(
      workflows.map((workflow, job) =>
        runWorkflow(workflow, {
          url,
          connect,
          table,
          steps: asked.steps,
          guidance: asked.guidance,
          onStep: (done, { batchedRequests, gpuMs }) =>
            progress.update(job, done, `${batchedRequests} requests in its batch, ${gpuMs.toFixed(0)} ms`),
        }),
      ),
    );
  } finally {
    progress.close();
  }
}

async function writeSheet(runs: readonly Run[]): Promise<void> {
  const rows = runs.map(({ workflow, pictures }) => ({
    title: workflow.name,
    lines: [...stackLabel(workflow.loras).split(/(?= \+ )/), `seed ${workflow.seed}`],
    captions: workflow.prompts.map(({ subject, ground }) => `${subject} on ${ground}`),
    pictures,
  }));
  await mkdir(new URL('./out/', import.meta.url), { recursive: true });
  await writeFile(SHEET, contactSheet(rows, PICTURE_SHAPE[2]));
}

/** What each stack of the workflows costs, at the batch of the first workflow. */
async function costs(client: Client, runs: readonly Run[], rounds: number): Promise<readonly Cost[]> {
  const table = await readTensors(`${ASSETS}prompts.safetensors`);
  const stacks = runs.map(({ workflow }) => workflow.loras);
  return loraCosts(client, stacks, contextRows(table, runs[0]!.workflow.prompts), rounds);
}

/** Runs everything against one server. False when the server's numbers are not PyTorch's. */
async function demonstrate(url: string, asked: Options): Promise<boolean> {
  const connect = asked.token === undefined ? {} : { token: asked.token };
  const client = await Client.connect(url, connect);
  try {
    const { device, server } = client.hello;
    console.log(`${server} at ${url} on ${device.name} (${device.backend})`);
    const { dtype, sizeBytes } = await client.modelLoad(MODEL);
    console.log(`${MODEL}: ${(sizeBytes / 2 ** 20).toFixed(1)} MiB of ${dtype} weights on the GPU\n`);

    console.log('Against PyTorch (float32, LoRAs merged), five requests sent at once:');
    const found = await deviations(client, await readTensors(`${ASSETS}reference.safetensors`));
    console.log(`${deviationTable(found)}\n`);

    console.log(`${WORKFLOWS.length} workflows at once, ${asked.pictures} pictures each:`);
    const begun = performance.now();
    const runs = await runAll(url, connect, asked);
    const seconds = (performance.now() - begun) / 1000;
    const forwards = runs.length * asked.steps;
    const images = forwards * 2 * asked.pictures;
    console.log(`${runTable(runs)}\n`);
    console.log(
      `  together ${(forwards / seconds).toFixed(2)} steps/s, ${(images / seconds).toFixed(1)} images/s, ${seconds.toFixed(1)} s\n`,
    );
    await writeSheet(runs);

    if (asked.rounds > 0) {
      console.log('What a LoRA costs (median GPU time of one forward, stacks in turn):');
      console.log(`${costTable(await costs(client, runs, asked.rounds), 2 * asked.pictures)}\n`);
    }
    console.log('Memory on the GPU:');
    console.log(`${memoryLines(await client.stats(), runs)}\n`);
    console.log(`Pictures: ${SHEET}`);
    return report(found);
  } finally {
    await client.close();
  }
}

function report(found: readonly Deviation[]): boolean {
  const wrong = found.filter(({ relative }) => !(relative <= MAX_RELATIVE_ERROR));
  for (const { label, relative } of wrong) {
    console.error(`${label}: relative error ${relative}, at most ${MAX_RELATIVE_ERROR} is expected`);
  }
  return wrong.length === 0;
}

async function main(): Promise<void> {
  const asked = options();
  if (asked === null) {
    console.log(USAGE);
    return;
  }
  if (asked.url !== undefined) {
    process.exitCode = (await demonstrate(asked.url, asked)) ? 0 : 1;
    return;
  }
  // Room for a step of every workflow in one batch: two rows a picture.
  const maxBatch = String(2 * asked.pictures * WORKFLOWS.length);
  const folders = ['--models', `${ASSETS}models`, '--loras', `${ASSETS}loras`];
  // The workflows answer each step within milliseconds of each other: waiting that long lets all of them share a batch.
  const server = await startServer([...folders, '--max-batch', maxBatch, '--batch-wait-ms', '50']);
  try {
    process.exitCode = (await demonstrate(server.url, asked)) ? 0 : 1;
  } finally {
    await server.close();
  }
}

await main();
