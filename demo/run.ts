/**
 * Runs one workflow as a WebSocket client of its own: samples its pictures and notes what the server said of each step.
 * Does not print and does not draw.
 */
import { Client, type ConnectOptions, floatsOf, type Timing, tensorFrom } from '../src/client.ts';
import type { SafetensorsView } from '../src/safetensors.ts';
import { contextRows } from './prompts.ts';
import { sample } from './sampler.ts';
import { MODEL, PICTURE_SHAPE, type Workflow } from './workflows.ts';

export interface RunOptions {
  readonly url: string;
  readonly connect: ConnectOptions;
  readonly table: SafetensorsView;
  readonly steps: number;
  readonly guidance: number;
  readonly onStep: (done: number, timing: Timing) => void;
}

export interface Run {
  readonly workflow: Workflow;
  /** One [3, H, W] picture in [-1, 1] per prompt. */
  readonly pictures: readonly Float32Array[];
  /** Of every forward, in order. */
  readonly timings: readonly Timing[];
  readonly seconds: number;
}

/** Key under which the connection keeps the context after the first step. */
const CONTEXT_KEY = 'prompts';

/** All pictures of a workflow in one batch; each step is one forward of 2 rows (conditional, unconditional) a picture. */
export async function runWorkflow(workflow: Workflow, options: RunOptions): Promise<Run> {
  const client = await Client.connect(options.url, options.connect);
  try {
    const rows = 2 * workflow.prompts.length;
    const length = workflow.prompts.length * PICTURE_SHAPE.reduce((product, size) => product * size, 1);
    const context = contextRows(options.table, workflow.prompts);
    const timings: Timing[] = [];
    const begun = performance.now();
    const all = await sample(
      async (x, timestep) => {
        const conditioning =
          timings.length === 0
            ? { context, keep: { context: CONTEXT_KEY } }
            : { reuse: { context: CONTEXT_KEY } };
        const { out, timing } = await client.forward({
          model: MODEL,
          loras: workflow.loras,
          x: tensorFrom(x, [rows, ...PICTURE_SHAPE]),
          timesteps: tensorFrom(new Float32Array(rows).fill(timestep), [rows]),
          ...conditioning,
        });
        timings.push(timing);
        return floatsOf(out);
      },
      {
        length,
        seed: workflow.seed,
        steps: options.steps,
        guidance: options.guidance,
        onStep: (done) => options.onStep(done, timings.at(-1)!),
      },
    );
    const seconds = (performance.now() - begun) / 1000;
    const one = length / workflow.prompts.length;
    const pictures = workflow.prompts.map((_, i) => all.subarray(i * one, (i + 1) * one));
    return { workflow, pictures, timings, seconds };
  } finally {
    await client.close();
  }
}
