/**
 * The demo's numbers as text: one table of the runs, one of LoRA costs, one of deviations from PyTorch, one on memory.
 * Formats what was measured; measures nothing.
 */
import type { ServerStats } from '../src/client.ts';
import type { Cost, Deviation } from './measure.ts';
import type { Run } from './run.ts';
import { stackLabel } from './workflows.ts';

/** Columns padded to their widest cell; the first is left-aligned, the others right-aligned. */
export function table(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = header.map((name, i) => Math.max(name.length, ...rows.map((row) => row[i]!.length)));
  const line = (cells: readonly string[]): string =>
    `  ${cells.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))).join('  ')}`;
  return [line(header), line(widths.map((width) => '-'.repeat(width))), ...rows.map(line)].join('\n');
}

export function runTable(runs: readonly Run[]): string {
  const mean = (values: readonly number[]): number =>
    values.reduce((sum, value) => sum + value, 0) / values.length;
  return table(
    ['workflow', 'LoRA stack', 'steps/s', 'images a batch', 'requests a batch', 'queue ms', 'gpu ms'],
    runs.map(({ workflow, timings, seconds }) => [
      workflow.name,
      stackLabel(workflow.loras),
      (timings.length / seconds).toFixed(2),
      mean(timings.map((t) => t.batch)).toFixed(1),
      `${mean(timings.map((t) => t.batchedRequests)).toFixed(1)} of ${runs.length}`,
      mean(timings.map((t) => t.queueMs)).toFixed(0),
      mean(timings.map((t) => t.gpuMs)).toFixed(0),
    ]),
  );
}

export function costTable(costs: readonly Cost[], images: number): string {
  return table(
    ['LoRA stack', `gpu ms, ${images} images`, 'against none'],
    costs.map(({ label, gpuMs, ratio }) => [label, gpuMs.toFixed(1), `${ratio.toFixed(2)} x`]),
  );
}

export function deviationTable(found: readonly Deviation[]): string {
  return table(
    ['LoRA stack', 'relative error', 'worst value'],
    found.map(({ label, relative, worst }) => [label, relative.toExponential(1), worst.toExponential(1)]),
  );
}

/** What lies on the GPU now, against a merged copy of the weights for every distinct stack. */
export function memoryLines(stats: ServerStats, runs: readonly Run[]): string {
  const { weightBytes, adapterBytes, arenaBytes } = stats.engine.memory;
  const copies = new Set(runs.map(({ workflow }) => stackLabel(workflow.loras))).size;
  const mib = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  return [
    `  weights once ${mib(weightBytes)} + adapters ${mib(adapterBytes)} = ${mib(weightBytes + adapterBytes)}`,
    `  against ${copies} merged copies of the weights: ${mib(copies * weightBytes)} (computed)`,
    `  activations of one batch: ${mib(arenaBytes)}`,
  ].join('\n');
}
