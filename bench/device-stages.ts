/** The stages of `bench device` as commands, in order. Runs nothing. */
import { FOLDER, FULL_MODELS, type FullModel } from './full-size.ts';

/** Where stages leave their files. */
export const RESULTS: string = `${FOLDER}device/`;

/** Choices of kernels that the run measures. */
export const TUNING: string = `${RESULTS}tuning.json`;

export interface Stage {
  readonly name: string;
  /** Behind `node`; `result` is the JSON file that it is to write, where it writes any. */
  readonly args: (result: string) => readonly string[];
}

/** How much of everything. */
interface Extent {
  /** Latent pixels a side. */
  readonly steps: readonly (readonly [model: FullModel, size: number])[];
  readonly rounds: number;
  readonly tuningRounds: number;
  readonly probe: readonly string[];
  readonly numbers: readonly string[];
  readonly unets: string;
  readonly kernels: readonly string[];
  readonly torch: readonly string[];
}

const WHOLE: Extent = {
  steps: [
    ['sd15', 64],
    ['sdxl', 128],
  ],
  rounds: 15,
  tuningRounds: 5,
  probe: [],
  numbers: [],
  unets: 'f16',
  kernels: [],
  torch: ['--peers', '^PyTorch CUDA', '--steps'],
};

/** What a software driver gets through in minutes; PyTorch on the CPU, too. */
const QUICK: Extent = {
  steps: [['sd15', 8]],
  rounds: 2,
  tuningRounds: 1,
  probe: ['--quick'],
  numbers: ['-t', 'layer_norm|geglu'],
  unets: 'sd1 .* f16',
  kernels: ['--filter', 'norm'],
  torch: ['--peers', '^PyTorch', '--filter', '^gemm 1024'],
};

export interface StageOptions {
  readonly quick?: boolean | undefined;
  readonly python?: string | undefined;
  readonly adapter?: string | undefined;
}

const SOURCE = ['--import', 'tsx'] as const;
const BENCH = [...SOURCE, 'bench/main.ts'] as const;

const tests = (result: string, ...args: readonly string[]): readonly string[] => [
  ...['node_modules/vitest/vitest.mjs', 'run', '--reporter=default', '--reporter=json'],
  ...[`--outputFile.json=${result}`, ...args],
];

export function stagesOf({ quick = false, python, adapter }: StageOptions): readonly Stage[] {
  const extent = quick ? QUICK : WHOLE;
  const rounds = ['--rounds', String(extent.rounds)];
  const on = adapter ? ['--adapter', adapter] : [];
  const measure = (command: string, result: string, ...args: readonly string[]): readonly string[] => [
    ...[...BENCH, command, ...args, '--json', result, ...on],
  ];
  const each = (what: string, args: (model: FullModel, size: number, result: string) => readonly string[]) =>
    extent.steps.map(([model, size]) => ({
      name: `${FULL_MODELS[model]} ${what}`,
      args: (result: string) => args(model, size, result),
    }));
  const step = (model: FullModel, size: number): readonly string[] => [
    ...['--model', model, '--size', String(size), '--batch', '2', ...rounds],
  ];
  return [
    { name: 'probe', args: (result) => measure('probe', result, ...extent.probe) },
    {
      name: 'kernel numbers',
      args: (result) => tests(result, 'test/kernels/numbers.test.ts', ...extent.numbers),
    },
    {
      name: 'matrix UNets',
      args: (result) => tests(result, '--config', 'vitest.matrix.config.ts', 'test/unet/matrix.test.ts'),
    },
    { name: 'UNets', args: (result) => tests(result, 'test/engine/engine.test.ts', '-t', extent.unets) },
    { name: 'kernels', args: (result) => measure('kernels', result, ...extent.kernels) },
    ...each('by rules', (model, size, result) => measure('unet', result, ...step(model, size))),
    ...each('tuning', (model, size) => [
      ...[...SOURCE, 'src/cli.ts', 'tune', '--like', model, '--size', `${size}x${size}`, '--batch', '2'],
      ...['--dtype', 'f16', '--rounds', String(extent.tuningRounds), '--tuning', TUNING, ...on],
    ]),
    ...each('tuned', (model, size, result) =>
      measure('unet', result, ...step(model, size), '--tuning', TUNING),
    ),
    {
      name: 'PyTorch',
      args: (result) => {
        const interpreter = python ? ['--python', python] : [];
        return measure('peers', result, ...extent.torch, ...rounds, '--tuning', TUNING, ...interpreter);
      },
    },
  ];
}
