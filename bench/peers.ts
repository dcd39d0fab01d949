/**
 * The same works by this project and by others on this machine: in turns, from inputs in memory to results in memory, medians
 * and ratios, and how far the results are apart. Peers are processes of their own (`peers/`), installed here when they are
 * missing.
 */
import { readFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { Device } from '../src/gpu/device.ts';
import { factsOf, writeResult } from './facts.ts';
import { median } from './measure.ts';
import { type Ratio, ratioOf } from './pairs.ts';
import { Contender, type Run } from './peers/contender.ts';
import { install, type Need, PYTHON, SD_CPP, writeGraphs } from './peers/install.ts';
import { jobOf, type Op, STEPS, WORKS, type Work } from './peers/works.ts';

export interface PeersBenchOptions {
  readonly filter: RegExp;
  readonly peers: RegExp;
  readonly rounds: number;
  /** Whole steps for a GPU instead of kernels and forwards of one image. */
  readonly steps?: boolean | undefined;
  readonly python?: string | undefined;
  /** File of choices that `unetd tune` measured, for ours. */
  readonly tuning?: string | undefined;
  readonly json?: string | undefined;
  readonly adapter?: string | undefined;
}

interface Peer {
  readonly name: string;
  readonly command: readonly [string, ...string[]];
  readonly needs: readonly Need[];
  /** Runs ONNX graphs. */
  readonly graphs?: boolean;
  /** Works it takes; all when left out. */
  readonly ops?: readonly Op[];
}

const NODE = [process.execPath, '--import', 'tsx'] as const;

/** `given`: an interpreter that has PyTorch and what ComfyUI imports, in the place of the one that is installed. */
const peersOf = (given: string | undefined): readonly Peer[] => {
  const torch = (name: string, device: 'cpu' | 'cuda', ...more: readonly string[]): Peer => ({
    name,
    command: [given ?? PYTHON, 'bench/peers/torch_peer.py', device, ...more],
    needs: [...(given ? [] : (['reference'] as const)), ...(device === 'cuda' ? (['card'] as const) : [])],
  });
  return [
    {
      name: 'onnxruntime WebGPU',
      command: [...NODE, 'bench/peers/onnxruntime.ts', 'webgpu'],
      needs: ['npm', 'venv'],
      graphs: true,
    },
    {
      name: 'onnxruntime CPU',
      command: [...NODE, 'bench/peers/onnxruntime.ts', 'cpu'],
      needs: ['npm', 'venv'],
      graphs: true,
    },
    torch('PyTorch CPU', 'cpu'),
    torch('PyTorch CUDA', 'cuda'),
    torch('PyTorch CUDA compiled', 'cuda', 'compiled'),
    {
      name: 'tinygrad WebGPU',
      command: [PYTHON, 'bench/peers/tinygrad_webgpu.py'],
      needs: ['venv'],
      ops: ['gemm', 'conv', 'attention', 'group norm'],
    },
    {
      name: 'ncnn Vulkan',
      command: [PYTHON, 'bench/peers/ncnn_vulkan.py'],
      needs: ['venv'],
      ops: ['conv'],
    },
    {
      name: 'stable-diffusion.cpp Vulkan',
      command: [PYTHON, 'bench/peers/sd_cpp.py', SD_CPP],
      needs: ['sd_cpp'],
      ops: ['unet'],
    },
  ];
};

/** What threads of a contender may still spin for after a run. */
const REST_MS = 100;

/** One side of a comparison. */
interface Side {
  readonly name: string;
  readonly graphs?: boolean | undefined;
  readonly contender: Contender;
}

export interface Row {
  readonly work: string;
  readonly op: Op;
  readonly flops: number;
  readonly peer: string;
  /** How our tensors are stored. */
  readonly storage: string;
  readonly rounds: number;
  readonly peerMs: number;
  readonly oursMs: number;
  /** Processor time of the whole process over all cores. */
  readonly peerCoreMs: number;
  readonly oursCoreMs: number;
  /** How many times as long the peer takes. */
  readonly ratio: Ratio;
  readonly coreRatio: Ratio;
  /** ||peer - ours|| / ||ours|| */
  readonly difference: number;
}

/** Normalised; NaN and infinity stay. */
function difference(path: string, reference: string): number {
  const floats = (file: string): Float32Array => new Float32Array(new Uint8Array(readFileSync(file)).buffer);
  const [got, want] = [floats(path), floats(reference)];
  if (got.length !== want.length)
    throw new Error(`${path} holds ${got.length} values, ${reference} ${want.length}`);
  const error = got.reduce((sum, value, i) => sum + (value - want[i]!) ** 2, 0);
  return Math.sqrt(error / want.reduce((sum, value) => sum + value ** 2, 0));
}

/** Our storages beside one peer: loads the work everywhere, then all run in turns. */
async function compare(
  work: Work,
  ours: readonly Side[],
  peer: Side,
  rounds: number,
): Promise<readonly Row[]> {
  const sides = [...ours, peer];
  const outs = new Map<string, string>();
  try {
    for (const { name, graphs, contender } of sides) {
      const job = jobOf(work, name);
      if (graphs) writeGraphs(job);
      await contender.load(job);
      outs.set(name, job.out);
    }
    const runs = new Map(sides.map(({ name }) => [name, [] as Run[]]));
    for (let round = 0; round < rounds; round++)
      for (const { name, contender } of sides) {
        await sleep(REST_MS);
        runs.get(name)!.push(await contender.run());
      }
    const theirs = runs.get(peer.name)!;
    return ours.map(({ name }) => {
      const own = runs.get(name)!;
      const each = (all: readonly Run[], of: keyof Run): number =>
        median(all.map((run) => run[of])) / work.repeats;
      const ratio = (of: keyof Run): Ratio => ratioOf(theirs.map((run, i) => run[of] / own[i]![of]));
      return {
        ...{ work: work.name, op: work.op, flops: work.flops, peer: peer.name, storage: name, rounds },
        peerMs: each(theirs, 'ms'),
        oursMs: each(own, 'ms'),
        peerCoreMs: each(theirs, 'cpuMs') / cpus().length,
        oursCoreMs: each(own, 'cpuMs') / cpus().length,
        ratio: ratio('ms'),
        coreRatio: ratio('cpuMs'),
        difference: difference(outs.get(peer.name)!, outs.get(name)!),
      };
    });
  } finally {
    for (const { contender } of sides.filter(({ name }) => outs.has(name))) await contender.unload();
  }
}

function show(row: Row): void {
  const ms = (value: number): string => value.toFixed(value < 10 ? 2 : 1).padStart(10);
  const times = (ratio: Ratio): string => `${ratio.median.toFixed(2)}x`.padStart(9);
  console.log(
    `${row.work.padEnd(24)} ${row.peer.padEnd(28)}${row.storage.padEnd(4)}${ms(row.peerMs)}${ms(row.oursMs)}` +
      `${times(row.ratio)} (${row.ratio.low.toFixed(2)} to ${row.ratio.high.toFixed(2)})`.padEnd(27) +
      `${times(row.coreRatio)}   ${row.difference.toExponential(1)}`,
  );
}

/** A whole forward once in f16, as servers run it by default; kernels in both storages. */
const storagesOf = ({ full }: Work): readonly string[] => (full ? ['f16'] : ['f16', 'f32']);

async function comparePeer(
  peer: Peer,
  works: readonly Work[],
  { rounds, adapter = '', tuning, python = PYTHON }: PeersBenchOptions,
  note: (rows: readonly Row[]) => void,
): Promise<void> {
  const missing = install(peer.needs, python);
  if (missing !== undefined) {
    console.log(`${peer.name} is left out: ${missing}`);
    return;
  }
  const start = ({ name, command, graphs }: Pick<Peer, 'name' | 'command' | 'graphs'>): Side => ({
    ...{ name, graphs },
    contender: new Contender(command),
  });
  for (const work of works) {
    const reason = peer.graphs && work.full ? install(['reference'], python) : undefined;
    if (reason !== undefined) {
      console.log(`${peer.name} is left out of ${work.name}: ${reason}`);
      continue;
    }
    const ours = storagesOf(work).map((storage) =>
      start({
        name: storage,
        command: [...NODE, 'bench/peers/ours.ts', storage, adapter, ...(tuning ? [tuning] : [])],
      }),
    );
    const theirs = start(peer);
    try {
      note(await compare(work, ours, theirs, rounds));
    } catch (error) {
      console.log(`${peer.name} fails at ${work.name}: ${error instanceof Error ? error.message : error}`);
    } finally {
      for (const { contender } of [...ours, theirs]) contender.close();
    }
  }
}

export async function benchPeers(options: PeersBenchOptions): Promise<void> {
  const device = await Device.open({ adapter: options.adapter });
  const facts = factsOf(device.adapter);
  device.close();
  console.log(`medians of ${options.rounds} rounds in turns, in ms; processor: ratio of processor time`);
  console.log(
    `${'work'.padEnd(25)}${'peer'.padEnd(28)}ours${'peer ms'.padStart(10)}${'ours ms'.padStart(10)}` +
      `${'ratio'.padStart(9)}${''.padEnd(17)}${'processor'.padStart(10)}   difference`,
  );
  const rows: Row[] = [];
  const works = options.steps ? STEPS : WORKS;
  for (const peer of peersOf(options.python).filter(({ name }) => options.peers.test(name)))
    await comparePeer(
      peer,
      works.filter(({ name, op }) => options.filter.test(name) && (peer.ops?.includes(op) ?? true)),
      options,
      (fresh) => {
        for (const row of fresh) show(row);
        rows.push(...fresh);
        writeResult(options.json, 'peers', facts, { rows });
      },
    );
}
