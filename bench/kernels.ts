/**
 * Kernels at the shapes SD 1.5 gives them at 512x512, against the adapter's measured peaks. The dispatches are those of
 * the tests' cases; results are not compared here.
 */
import { Device } from '../src/gpu/device.ts';
import type { Storage } from '../src/gpu/kernel.ts';
import { attentionCase } from '../test/kernels/attention.cases.ts';
import type { Case } from '../test/kernels/case.ts';
import { variantsOf } from '../test/kernels/cases.ts';
import { gegluCase } from '../test/kernels/elementwise.cases.ts';
import { gemmCase } from '../test/kernels/gemm.cases.ts';
import type { GemmShape } from '../test/kernels/gemm_shapes.ts';
import { groupNormCase } from '../test/kernels/group_norm.cases.ts';
import { layerNormCase } from '../test/kernels/layer_norm.cases.ts';
import { factsOf, writeResult } from './facts.ts';
import { type Measured, measureInTurns } from './measure.ts';
import { peaksOf, peakWorkOf, rateOf } from './peak.ts';

export interface KernelBenchOptions {
  readonly json?: string | undefined;
  readonly filter?: RegExp | undefined;
  readonly storages: readonly Storage[];
  readonly variant?: string | undefined;
  readonly adapter?: string | undefined;
}

const gemm = (m: number, channels: number, n: number, more: Partial<GemmShape> = {}): Case =>
  gemmCase({
    name: `gemm ${m}x${channels}x${n}${more.lora ? ' + rank 16' : ''}${more.blocks ? ' q8_0' : ''}`,
    m,
    channels,
    n,
    ...more,
  });

const conv = (channels: number, side: number, blocks = false): Case =>
  gemmCase({
    name: `conv 3x3 ${channels}@${side}x${side}${blocks ? ' q8_0' : ''}`,
    blocks,
    channels,
    n: channels,
    conv: { srcHeight: side, srcWidth: side, inHeight: side, inWidth: side, stride: 1 },
    bias: true,
  });

const attention = (tokens: number, headDim: number, keys = tokens): Case =>
  attentionCase({
    name: `attention 8x${tokens}x${headDim}${keys === tokens ? '' : `, ${keys} keys`}`,
    heads: 8,
    headDim,
    queries: tokens,
    keys,
  });

const RANK_16 = [[{ rank: 16, scale: 1 }]] as const;

/** Whether arithmetic or memory bounds a kernel, and the kernel at its shape. */
const CASES: readonly (readonly ['flops' | 'bytes', Case])[] = [
  ['flops', gemm(1024, 1280, 1280)],
  ['flops', gemm(1024, 1280, 1280, { lora: RANK_16 })],
  ['flops', gemm(4096, 320, 320)],
  ['flops', gemm(4096, 320, 320, { lora: RANK_16 })],
  ['flops', gemm(4096, 320, 2560)],
  ['flops', gemm(1024, 1280, 1280, { blocks: true })],
  ['flops', gemm(4096, 320, 320, { blocks: true })],
  ['flops', conv(320, 64)],
  ['flops', conv(640, 32)],
  ['flops', conv(1280, 16)],
  ['flops', conv(640, 32, true)],
  ['flops', attention(1024, 80)],
  ['flops', attention(4096, 40)],
  ['flops', attention(4096, 40, 77)],
  ['bytes', groupNormCase({ name: 'group norm 320x64x64', tokens: 4096, channels: 320, silu: true })],
  ['bytes', layerNormCase({ name: 'layer norm 4096x320', rows: 4096, channels: 320 })],
  // Of the residual stream, which is f32 in either storage: all layer norms of a UNet, and most group norms.
  [
    'bytes',
    groupNormCase({ name: 'group norm of the stream', tokens: 4096, channels: 320, silu: true, wide: ['x'] }),
  ],
  ['bytes', layerNormCase({ name: 'layer norm of the stream', rows: 4096, channels: 320, wide: ['x'] })],
  ['bytes', gegluCase({ name: 'geglu 4096x1280', rows: 4096, inner: 1280 })],
];

export interface Row extends Measured {
  readonly name: string;
  readonly storage: Storage;
  /** GFLOP/s or GB/s by the median, and what share of the adapter's peak, measured in turns with it, that is. */
  readonly rate: number;
  readonly unit: 'GFLOP/s' | 'GB/s';
  readonly share: number;
  /** The same, by processor time; software drivers only. */
  readonly coreRate: number | undefined;
  readonly coreShare: number | undefined;
}

function show(row: Row): void {
  const core =
    row.coreRate === undefined
      ? ''
      : `${row.coreRate.toFixed(1).padStart(9)} ${((row.coreShare ?? 0) * 100).toFixed(0).padStart(4)} %`;
  console.log(
    `${row.name.padEnd(28)} ${row.storage} ${row.ms.toFixed(2).padStart(9)} ± ${row.spreadMs.toFixed(2).padStart(7)} ms` +
      `${row.rate.toFixed(1).padStart(9)} ${row.unit.padEnd(7)} ${(row.share * 100).toFixed(0).padStart(4)} %${core}`,
  );
}

export async function benchKernels(options: KernelBenchOptions): Promise<void> {
  const device = await Device.open({ adapter: options.adapter });
  const facts = factsOf(device.adapter);
  if (device.capabilities.software) console.log('the last columns count processor time instead');
  const peak = await peaksOf(device);
  const rows: Row[] = [];
  for (const [by, one] of CASES.filter(([, { name }]) => options.filter?.test(name) ?? true))
    for (const storage of options.storages.filter((s) => one.storages?.includes(s) ?? true)) {
      const forced =
        options.variant && variantsOf(one).includes(options.variant) ? options.variant : undefined;
      // In turns with its peak: what else a machine does slows both.
      const works = [{ one, storage, variant: forced }, peakWorkOf(device, peak, by, storage)];
      const [measured, most] = (await measureInTurns(device, works, 1500)) as [Measured, Measured];
      const rate = rateOf(by, measured, measured.ms);
      const coreRate = measured.coreMs && rateOf(by, measured, measured.coreMs);
      const corePeak = most.coreMs && rateOf(by, most, most.coreMs);
      rows.push({
        ...measured,
        name: one.name,
        storage,
        rate,
        unit: by === 'flops' ? 'GFLOP/s' : 'GB/s',
        share: rate / rateOf(by, most, most.ms),
        coreRate,
        coreShare: coreRate && corePeak && coreRate / corePeak,
      });
      show(rows.at(-1)!);
    }
  writeResult(options.json, 'kernels', facts, { peak, rows });
  device.close();
}
