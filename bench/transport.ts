/**
 * What a step costs beyond its forward: the node pack's client and `unetd serve` on the loopback address, with an engine that
 * computes nothing. Processes, sockets, session, batcher and the channel to the engine's process are the real ones.
 */
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cpus, loadavg } from 'node:os';
import { fileURLToPath } from 'node:url';
import { startServer } from '../demo/server.ts';
import { Engine } from '../test/server/no-op-engine.ts';
import { CONFIG, makePlace, modelFile } from '../test/server/setting.ts';
import { quantile } from './measure.ts';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const PYTHON = `${ROOT}.cache/reference-env/venv/bin/python`;
const ENGINE = new URL('../test/server/no-op-engine.ts', import.meta.url).href;

interface Shapes {
  readonly name: string;
  readonly dtype: 'F32' | 'F16';
  readonly x: readonly number[];
  readonly context: readonly number[];
  /** Width of `y`, or null. */
  readonly adm: number | null;
}

const SHAPES: readonly Shapes[] = [
  { name: 'SD 1.5, 512x512', dtype: 'F16', x: [2, 4, 64, 64], context: [2, 77, 768], adm: null },
  { name: 'SD 1.5, 512x512', dtype: 'F32', x: [2, 4, 64, 64], context: [2, 77, 768], adm: null },
  { name: 'SDXL, 1024x1024', dtype: 'F16', x: [2, 4, 128, 128], context: [2, 77, 2048], adm: 2816 },
];

/** Prints a line for each of the shapes. `steps`: how many are timed, after a tenth as many to warm up. */
export async function benchTransport(steps: number): Promise<void> {
  if (!existsSync(PYTHON)) throw new Error(`${PYTHON} is missing; run "bash test/reference/setup.sh" first.`);
  const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], {
    cwd: ROOT,
    encoding: 'utf8',
  }).trim();
  console.log(
    `commit ${commit}, ${cpus().length} cores, load ${loadavg()[0]?.toFixed(2)}, Node ${process.version}`,
  );
  console.log(`the forward by itself: ${(await bareForward(steps)).toFixed(4)} ms (median)`);
  const place = makePlace();
  for (const { name, context, adm } of SHAPES) {
    const config = { ...CONFIG, contextDim: context[2]!, admChannels: adm };
    place.write(`${name}.safetensors`, modelFile({}, config));
  }
  const server = await startServer(['--models', place.dir, '--engine-module', ENGINE]);
  try {
    for (const shapes of SHAPES) {
      const request = JSON.stringify({
        ...shapes,
        url: server.url,
        model: `${shapes.name}.safetensors`,
        steps,
      });
      const options = { cwd: `${ROOT}comfyui`, env: { ...process.env, PYTHONPATH: `${ROOT}comfyui` } };
      const output = execFileSync(PYTHON, [`${ROOT}bench/transport.py`, request], options);
      const times = (JSON.parse(output.toString()) as number[]).sort((a, b) => a - b);
      const [median, late] = [quantile(times, 0.5), quantile(times, 0.95)].map((ms) => `${ms.toFixed(2)} ms`);
      console.log(
        `${`${shapes.name}, ${shapes.dtype}`.padEnd(22)} median ${median}, p95 ${late}, ${steps} steps`,
      );
    }
  } finally {
    await server.close();
    place.remove();
  }
}

async function bareForward(steps: number): Promise<number> {
  const engine = await Engine.create();
  const tensor = (shape: readonly number[]) => ({
    dtype: 'F16' as const,
    shape,
    data: new Uint8Array(2 * shape.reduce((product, size) => product * size, 1)),
  });
  const [{ x, context }] = SHAPES as readonly [Shapes];
  const request = { loras: [], x: tensor(x), context: tensor(context), timesteps: tensor([2]) };
  const times: number[] = [];
  for (let step = 0; step < steps; step += 1) {
    const started = performance.now();
    await engine.forward({ model: 'none', requests: [request] });
    times.push(performance.now() - started);
  }
  return quantile(
    times.sort((a, b) => a - b),
    0.5,
  );
}
