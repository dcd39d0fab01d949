/**
 * What LoRAs cost on the full-size SD 1.5 UNet with random weights: overhead by rank and kind beside the share that is pure
 * arithmetic, batches whose images have different stacks, switching between resident adapters, and what a step uploads.
 */
import { Engine } from '../src/engine/engine.ts';
import type { LoraUse, StepRequest } from '../src/engine/types.ts';
import { trafficOf } from '../test/gpu/traffic.ts';
import { factsOf, writeResult } from './facts.ts';
import { type AdapterShape, adapterFile, arithmeticOf, modelFile, stepOf } from './full-size.ts';
import { inPairs, type Pairs, pairsOf, type Ratio, type Sample, sample } from './pairs.ts';

export interface LoraBenchOptions {
  readonly json?: string | undefined;
  readonly adapter?: string | undefined;
  readonly filter: RegExp;
  /** Latent pixels a side of single images; batches and switches take half of it, at least 16. */
  readonly size: number;
  readonly rounds: number;
  readonly switches: number;
}

type Shapes = readonly AdapterShape[];

const OVERHEADS: readonly (readonly [name: string, stack: Shapes])[] = [
  ...[4, 16, 32, 64, 128].map((rank) => [`rank ${rank}, linear layers`, [{ rank }]] as const),
  ['rank 32, convolutions too', [{ rank: 32, conv: true }]],
  ['three of rank 16, linear layers', [0, 1, 2].map((seed) => ({ rank: 16, seed }))],
];

/** Stacks of equal rank in all, cut differently. */
const MIXED: readonly Shapes[] = [
  [{ rank: 64 }],
  [{ rank: 32 }, { rank: 32, seed: 1 }],
  [{ rank: 16 }, { rank: 16, seed: 1 }, { rank: 32, seed: 2 }],
  [{ rank: 4 }, { rank: 12 }, { rank: 16, seed: 2 }, { rank: 32, seed: 3 }],
];
const SHARED: Shapes = [{ rank: 64 }];
const RING: Shapes = [0, 1, 2, 3].map((seed) => ({ rank: 32, seed }));
const STEPS = 20;

const usesOf = (stack: Shapes, strength = 0.7): readonly LoraUse[] =>
  stack.map((shape) => ({ lora: adapterFile(shape).name, strength }));

interface Row extends Pairs {
  readonly name: string;
  /** Latent pixels a side. */
  readonly size: number;
  /** Low-rank terms' share of the arithmetic of the base. */
  readonly arithmetic?: number;
  /** Uploaded meanwhile. */
  readonly adapterBytes?: number;
}

/** What steps put on the GPU besides their inputs. */
interface Uploads {
  readonly adapterBytes: number;
  readonly compiled: number;
  /** A step. */
  readonly tableBytes: number;
}

export interface LoraResult {
  readonly rounds: number;
  /** Time over that of what each is compared with. */
  readonly rows: readonly Row[];
  readonly uploads: Uploads | undefined;
}

const percent = (share: number): string => `${(share * 100).toFixed(1)} %`;
const column = (ratio: Ratio | undefined): string =>
  ratio === undefined
    ? '-'.padStart(24)
    : `${percent(ratio.median - 1).padStart(8)} (${percent(ratio.low - 1)} to ${percent(ratio.high - 1)})`.padEnd(
        28,
      );

const line = (name: string, { gpu, core }: Pairs, rest = ''): void =>
  console.log(`${name.padEnd(36)}${column(core)}${column(gpu)}${rest}`);

export async function benchLora(options: LoraBenchOptions): Promise<void> {
  const engine = await Engine.create({ ...(options.adapter ? { adapter: options.adapter } : {}) });
  const facts = factsOf(engine.device);
  const { size, rounds, json } = options;
  console.log(`SD 1.5 at ${size}x${size} latent pixels, f16`);
  console.log(
    'ratios are medians of interleaved pairs, their quartiles in brackets; processor time is that of the',
  );
  console.log("software driver's threads, which what else the machine does disturbs least\n");
  const model = modelFile();
  await engine.loadModel(model, 'f16');
  const bench = new Bench(engine, model.name, options);
  try {
    const rows = [...(await bench.overheads()), ...(await bench.batches()), ...(await bench.switching())];
    const uploads = await bench.uploads();
    writeResult(json, 'lora', facts, { rounds, rows, uploads } satisfies LoraResult);
  } finally {
    await engine.close();
  }
}

class Bench {
  readonly #engine: Engine;
  readonly #model: string;
  readonly #options: LoraBenchOptions;
  readonly #loaded = new Set<string>();

  constructor(engine: Engine, model: string, options: LoraBenchOptions) {
    this.#engine = engine;
    this.#model = model;
    this.#options = options;
  }

  /** One image with a stack against the same image without. */
  async overheads(): Promise<readonly Row[]> {
    const { size, rounds, filter } = this.#options;
    const step = stepOf(1, size);
    const arithmetic = arithmeticOf(size);
    console.log(`${'over base'.padEnd(36)}${'processor time'.padEnd(28)}${'GPU time'.padEnd(28)}arithmetic`);
    const rows: Row[] = [];
    for (const [name, stack] of OVERHEADS.filter(([row]) => filter.test(row))) {
      await this.#load(stack);
      const with_ = { ...step, loras: usesOf(stack) };
      const pairs = await inPairs(
        () => this.#forward([step]),
        () => this.#forward([with_]),
        rounds,
      );
      const share = stack.reduce((sum, one) => sum + arithmetic.lowRank(one), 0) / arithmetic.base;
      rows.push({ name, size, ...pairs, arithmetic: share });
      line(name, pairs, percent(share).padStart(8));
    }
    return rows;
  }

  /** Four images with four stacks against the same four with one. */
  async batches(): Promise<readonly Row[]> {
    const { rounds, filter } = this.#options;
    const name = 'four stacks, against one shared';
    if (!filter.test(name)) return [];
    await this.#load([...MIXED.flat(), ...SHARED]);
    const step = stepOf(1, this.#half);
    const one = MIXED.map(() => ({ ...step, loras: usesOf(SHARED) }));
    const four = MIXED.map((stack) => ({ ...step, loras: usesOf(stack) }));
    const pairs = await inPairs(
      () => this.#forward(one),
      () => this.#forward(four),
      rounds,
    );
    line(name, pairs);
    return [{ name, size: this.#half, ...pairs }];
  }

  /** The first step with a resident adapter that the step before did not use, against the step after it. */
  async switching(): Promise<readonly Row[]> {
    const { switches, filter } = this.#options;
    const name = `first step after a switch (${switches})`;
    if (!filter.test(name)) return [];
    await this.#load(RING);
    const step = stepOf(1, this.#half);
    const run = (i: number): Promise<Sample> =>
      this.#forward([{ ...step, loras: usesOf([RING[i % RING.length]!]) }]);
    for (const i of RING.keys()) await run(i);
    const [{ written }, samples] = await trafficOf(async () => {
      const pairs: (readonly [Sample, Sample])[] = [];
      for (let i = 0; i < switches; i++) {
        const first = await run(i);
        pairs.push([await run(i), first]);
      }
      return pairs;
    });
    const pairs = pairsOf(samples);
    const adapterBytes = written.get('adapters') ?? 0;
    line(name, pairs, `${adapterBytes} bytes of adapters uploaded`);
    return [{ name, size: this.#half, ...pairs, adapterBytes }];
  }

  /** Steps whose strengths follow a schedule. */
  async uploads(): Promise<Uploads | undefined> {
    const name = `a strength that changes at ${STEPS} steps`;
    if (!this.#options.filter.test(name)) return undefined;
    await this.#load(RING);
    const step = stepOf(1, this.#half);
    const run = (strength: number): Promise<Sample> =>
      this.#forward([{ ...step, loras: usesOf(RING.slice(0, 2), strength) }]);
    await run(1);
    const [{ written, compiled }] = await trafficOf(async () => {
      for (let i = 0; i < STEPS; i++) await run(1 - i / STEPS);
    });
    const adapterBytes = written.get('adapters') ?? 0;
    const tableBytes = (written.get('lora table') ?? 0) / STEPS;
    console.log(
      `${name}: ${adapterBytes} bytes of adapters uploaded, ${compiled} modules compiled, ${tableBytes} bytes of table a step`,
    );
    return { adapterBytes, compiled, tableBytes };
  }

  get #half(): number {
    return Math.max(16, this.#options.size / 2);
  }

  #forward(requests: readonly StepRequest[]): Promise<Sample> {
    return sample(() => this.#engine.forward({ model: this.#model, requests }));
  }

  async #load(stack: Shapes): Promise<void> {
    for (const source of stack.map(adapterFile)) {
      if (this.#loaded.has(source.name)) continue;
      await this.#engine.loadAdapter(source, this.#model);
      this.#loaded.add(source.name);
    }
  }
}
