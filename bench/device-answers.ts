/** What the stages of `bench device` found, put as answers and as a table of whole steps. Reads results; runs nothing. */
import type { MatrixConfig } from '../src/gpu/device.ts';
import type { Outcome } from './device.ts';
import { FULL_MODELS } from './full-size.ts';
import type { Row as PeerRow } from './peers.ts';
import type { ProbeResult } from './probe.ts';
import type { UNetResult } from './unet.ts';

/** Outcomes by the names of their stages. */
export type Found = ReadonlyMap<string, Outcome>;

export interface Answer {
  readonly question: string;
  readonly answer: string;
}

/** What is used of vitest's report. */
interface Tests {
  readonly numPassedTests: number;
  readonly numFailedTests: number;
  readonly numPendingTests: number;
}

const NOT_FOUND = 'not measured';

const resultOf = <T>(found: Found, stage: string): T | undefined => found.get(stage)?.result as T | undefined;

const rateText = (gflops: number): string =>
  gflops < 1000 ? `${gflops.toFixed(1)} GFLOP/s` : `${(gflops / 1000).toFixed(1)} TFLOP/s`;

/** Each of them as text, or that there is none. */
const listed = <T>(all: readonly T[], text: (one: T) => string, none = NOT_FOUND): string =>
  all.map(text).join('; ') || none;

const TEST_STAGES = ['kernel numbers', 'matrix UNets', 'UNets'] as const;

function testsOf(found: Found): string {
  const run = TEST_STAGES.flatMap((stage) => found.get(stage) ?? []);
  return listed(run, ({ name, end, result }) => {
    const tests = result as Tests | undefined;
    if (!tests) return `${name}: ${end}, no report`;
    const { numPassedTests: passed, numFailedTests: failed, numPendingTests: skipped } = tests;
    return `${name}: ${passed} passed, ${failed} failed, ${skipped} skipped`;
  });
}

const configText = ({ componentType, resultComponentType, M, N, K }: MatrixConfig): string =>
  `${componentType} -> ${resultComponentType} ${M}x${N}x${K}`;

/** The whole steps of a stage. */
const stepRows = (found: Found, how: 'by rules' | 'tuned'): UNetResult['rows'] =>
  Object.values(FULL_MODELS).flatMap((name) => resultOf<UNetResult>(found, `${name} ${how}`)?.rows ?? []);

function tuningText(found: Found): string {
  const byRules = stepRows(found, 'by rules');
  return listed(stepRows(found, 'tuned'), ({ model, gpuMs }) => {
    const before = byRules.find((row) => row.model === model);
    const from = before ? `${before.gpuMs.toFixed(1)} ms by rules, ` : '';
    return `${FULL_MODELS[model]}: ${from}${gpuMs.toFixed(1)} ms tuned`;
  });
}

const peersOf = (found: Found): readonly PeerRow[] =>
  resultOf<{ readonly rows: readonly PeerRow[] }>(found, 'PyTorch')?.rows ?? [];

/** The questions to a GPU that is new here, and what is known of each. */
export function answersOf(found: Found): readonly Answer[] {
  const probe = resultOf<ProbeResult>(found, 'probe');
  const configs = (probe?.info.subgroupMatrixConfigs ?? []) as readonly MatrixConfig[];
  const rates = probe?.rates ?? [];
  const rateRows = (prefix: string): string =>
    listed(
      rates.filter(({ name }) => name.startsWith(prefix)),
      ({ name, rate }) => `${name.slice(prefix.length)} ${rateText(rate)}`.trim(),
      'none',
    );
  const hasF16 = probe?.features.includes('shader-f16');
  return [
    { question: 'device', answer: probe ? String(probe.info.description || probe.info.device) : NOT_FOUND },
    { question: 'f16 in shaders', answer: hasF16 === undefined ? NOT_FOUND : hasF16 ? 'on' : 'not offered' },
    { question: 'right on this driver', answer: testsOf(found) },
    { question: 'matrix configurations', answer: probe ? listed(configs, configText, 'none') : NOT_FOUND },
    { question: 'matrix units', answer: probe ? rateRows('matrix units') : NOT_FOUND },
    { question: 'multiply-add in f32', answer: probe ? rateRows('f32 multiply-add') : NOT_FOUND },
    { question: 'weights to the units', answer: probe ? rateRows('weights') : NOT_FOUND },
    {
      question: 'a dispatch in a row',
      answer: probe?.dispatchUs === undefined ? NOT_FOUND : `${probe.dispatchUs.toFixed(2)} us`,
    },
    {
      question: 'encoding a dispatch',
      answer: listed(
        stepRows(found, 'by rules'),
        (row) =>
          `${FULL_MODELS[row.model]} ${row.encoding.us.toFixed(1)} us, submit ${row.submitMs.toFixed(1)} ms`,
      ),
    },
    { question: 'tuned in whole UNets', answer: tuningText(found) },
    {
      question: 'beside PyTorch',
      answer: listed(
        peersOf(found),
        (row) =>
          `${row.work}, ${row.peer}: ${row.peerMs.toFixed(1)} ms, ours in ${row.storage} ${row.oursMs.toFixed(1)} ms, ` +
          `${row.ratio.median.toFixed(2)}x, apart ${row.difference.toExponential(1)}`,
      ),
    },
  ];
}

/** Whole steps: time on the GPU, rate, share of the measured peak, and the wall time of PyTorch over ours. */
export function stepsOf(found: Found): readonly (readonly string[])[] {
  const rows = (['by rules', 'tuned'] as const).flatMap((how) =>
    Object.values(FULL_MODELS).flatMap((name) => {
      const result = resultOf<UNetResult>(found, `${name} ${how}`);
      return (result?.rows ?? []).map((row) => {
        const { size, batch, gpuMs, flops } = row;
        return [
          ...[`${name} ${size * 8}x${size * 8}, ${batch} images, ${how}`, gpuMs.toFixed(1)],
          ...[rateText(flops / gpuMs / 1e6), `${((flops / gpuMs / result!.rates.flops) * 100).toFixed(0)} %`],
        ];
      });
    }),
  );
  return [['step', 'ms', 'rate', 'of the peak'], ...rows];
}
