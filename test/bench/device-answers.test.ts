/** No GPU: what `bench device` says of stages that went well, badly, or not at all. */
import { expect, test } from 'vitest';
import type { Outcome } from '../../bench/device.ts';
import { answersOf, type Found, stepsOf } from '../../bench/device-answers.ts';

const outcome = (name: string, result: unknown, end = 'done'): Outcome => ({
  ...{ name, command: 'node', seconds: 1, end, result },
});
const found = (...outcomes: readonly Outcome[]): Found => new Map(outcomes.map((one) => [one.name, one]));
const answer = (all: Found, to: string): string | undefined =>
  answersOf(all).find(({ question }) => question === to)?.answer;

const step = (gpuMs: number) => ({
  rates: { flops: 4e9, bytes: 1e9 },
  rows: [
    { model: 'sd15', size: 64, batch: 2, gpuMs, flops: 40e9, encoding: { us: 2.5, callsUs: 2 }, submitMs: 1 },
  ],
});

test('without any stage nothing is claimed', () => {
  for (const { answer: text } of answersOf(found())) expect(text).toBe('not measured');
  expect(stepsOf(found())).toHaveLength(1);
});

test('tests that fail, and tests that end without a report, are told', () => {
  const tests = { numPassedTests: 7, numFailedTests: 2, numPendingTests: 1 };
  const all = found(
    outcome('kernel numbers', tests, 'ended with 1'),
    outcome('UNets', undefined, 'ended by SIGABRT'),
  );
  expect(answer(all, 'right on this driver')).toBe(
    'kernel numbers: 7 passed, 2 failed, 1 skipped; UNets: ended by SIGABRT, no report',
  );
});

test('the facts of a probe stand in the answers', () => {
  const config = { componentType: 'f16', resultComponentType: 'f32', M: 16, N: 8, K: 16 };
  const rates = [
    { name: 'f32 multiply-add', rate: 60_000, unit: 'GFLOP/s', ms: 1 },
    { name: 'weights direct 64x64x64', rate: 900, unit: 'GFLOP/s', ms: 1 },
  ];
  const info = { description: 'a card', subgroupMatrixConfigs: [config] };
  const all = found(outcome('probe', { info, features: ['shader-f16'], rates, dispatchUs: 3.2 }));
  expect(answer(all, 'device')).toBe('a card');
  expect(answer(all, 'f16 in shaders')).toBe('on');
  expect(answer(all, 'matrix configurations')).toBe('f16 -> f32 16x8x16');
  expect(answer(all, 'matrix units')).toBe('none');
  expect(answer(all, 'multiply-add in f32')).toBe('60.0 TFLOP/s');
  expect(answer(all, 'weights to the units')).toBe('direct 64x64x64 900.0 GFLOP/s');
  expect(answer(all, 'a dispatch in a row')).toBe('3.20 us');
});

test('steps are held against the peak, and tuning against the rules', () => {
  const all = found(outcome('SD 1.5 by rules', step(50)), outcome('SD 1.5 tuned', step(40)));
  expect(answer(all, 'tuned in whole UNets')).toBe('SD 1.5: 50.0 ms by rules, 40.0 ms tuned');
  expect(stepsOf(all).slice(1)).toEqual([
    ['SD 1.5 512x512, 2 images, by rules', '50.0', '800.0 GFLOP/s', '20 %'],
    ['SD 1.5 512x512, 2 images, tuned', '40.0', '1.0 TFLOP/s', '25 %'],
  ]);
});
