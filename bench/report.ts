/**
 * Writes the tables of `docs/PERFORMANCE.md` and the plots beside it from the files in `bench/results`. Measures nothing, and
 * shows nothing that is not in such a file.
 */
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { Facts } from './facts.ts';
import { FULL_MODELS } from './full-size.ts';
import type { Row as KernelRow } from './kernels.ts';
import type { LoadResult } from './load.ts';
import type { LoraResult } from './lora.ts';
import type { Ratio } from './pairs.ts';
import type { Row as PeerRow } from './peers.ts';
import { type Bar, barsOf } from './plot.ts';
import type { ServerResult } from './server.ts';
import type { UNetResult } from './unet.ts';

const RESULTS: string = fileURLToPath(new URL('results/', import.meta.url));
const DOCS: string = fileURLToPath(new URL('../docs/', import.meta.url));

/** Families of kernels below are not listed. */
const LEAST_SHARE = 0.02;

type Result<T> = Facts & T & { readonly bench: string };

/** How a command's results are shown: its table with a head, and bars over all its files. */
interface Section<T> {
  readonly head: readonly string[];
  readonly rows: (result: Result<T>) => readonly (readonly string[])[];
  readonly title: string;
  readonly bars: (result: Result<T>) => readonly Bar[];
  readonly mark?: { readonly value: number; readonly text: string };
}

const fixed = (value: number | undefined, digits = 1): string => value?.toFixed(digits) ?? '-';
const percent = (share: number | undefined): string =>
  share === undefined ? '-' : `${(share * 100).toFixed(0)} %`;
const times = (ratio: number): string => `${ratio.toFixed(2)}x`;

const kernels: Section<{ readonly rows: readonly KernelRow[] }> = {
  head: ['kernel', 'stored as', 'ms', 'rate', 'of the peak', 'by processor time'],
  rows: ({ rows }) =>
    rows.map((row) => [
      ...[row.name, row.storage, fixed(row.ms, 2), `${fixed(row.rate)} ${row.unit}`],
      ...[percent(row.share), percent(row.coreShare)],
    ]),
  title: "Kernels, share of the adapter's measured peak",
  bars: ({ rows }) =>
    rows.map(({ name, storage, share, rate, unit }) => ({
      label: `${name}, ${storage}`,
      value: share,
      text: `${percent(share)}, ${fixed(rate, 0)} ${unit}`,
    })),
  mark: { value: 1, text: 'peak' },
};

const nameOf = ({ model, size, batch }: UNetResult['rows'][number]): string =>
  `${FULL_MODELS[model]}, ${size}x${size}, batch ${batch}`;

const unet: Section<UNetResult> = {
  head: [
    ...['forward', 'ms', 'by processor time', 'over the first batch', 'by processor time'],
    ...['GFLOP/s', 'of the peak', 'of the roofline'],
    ...['dispatches', 'us to encode each', 'of them in calls', 'where the time goes'],
  ],
  rows: ({ rows, rates }) =>
    rows.map((row) => {
      const total = row.families.reduce((sum, family) => sum + family.ms, 0);
      const shares = row.families
        .map(({ name, ms }) => ({ name, share: ms / total }))
        .filter(({ share }) => share >= LEAST_SHARE)
        .map(({ name, share }) => `${name} ${percent(share)}`);
      return [
        ...[nameOf(row), fixed(row.gpuMs, 0), fixed(row.coreMs, 0)],
        ...[times(row.overFirst.median), row.coreOverFirst ? times(row.coreOverFirst.median) : '-'],
        ...[fixed(row.flops / row.gpuMs / 1e6), percent(row.flops / row.gpuMs / rates.flops)],
        ...[percent(row.rooflineMs / row.gpuMs), String(row.dispatches)],
        ...[fixed(row.encoding.us), fixed(row.encoding.callsUs)],
        shares.join(', '),
      ];
    }),
  title: "Whole forwards, share of the adapter's measured multiply-add peak",
  bars: ({ rows, rates }) =>
    rows.map((row) => {
      const share = row.flops / row.gpuMs / rates.flops;
      return { label: nameOf(row), value: share, text: `${percent(share)}, ${fixed(row.gpuMs, 0)} ms` };
    }),
  mark: { value: 1, text: 'peak' },
};

const load: Section<LoadResult> = {
  head: ['file', 'work', 's', 'GB/s', 's by processor time', 'GB/s'],
  rows: ({ model, sizeBytes, rows }) =>
    rows.map(({ name, seconds, coreSeconds }) => [
      ...[`${FULL_MODELS[model]}, ${fixed(sizeBytes / 1e9, 2)} GB`, name],
      ...[seconds, coreSeconds].flatMap((s) => [fixed(s, 2), fixed(sizeBytes / 1e9 / s, 2)]),
    ]),
  title: 'Loading a file that the machine has in its cache, seconds',
  bars: ({ model, rows }) =>
    rows.map(({ name, seconds }) => ({
      label: `${FULL_MODELS[model]}, ${name}`,
      value: seconds,
      text: `${fixed(seconds, 2)} s`,
    })),
};

const tenths = (share: number): string => `${fixed(share * 100)} %`;
const more = (ratio: number): string => tenths(ratio - 1);
const range = ({ low, high }: Ratio): string => `${more(low)} to ${more(high)}`;

const lora: Section<LoraResult> = {
  head: ['what', 'size', 'more time', 'quartiles', 'by processor time', 'quartiles', 'more arithmetic'],
  rows: ({ rows }) =>
    rows.map(({ name, size, gpu, core, arithmetic }) => [
      ...[name, `${size}x${size}`, more(gpu.median), range(gpu)],
      ...(core ? [more(core.median), range(core)] : ['-', '-']),
      arithmetic === undefined ? '-' : tenths(arithmetic),
    ]),
  title: 'Time of forwards with LoRAs over that of what each is compared with',
  bars: ({ rows }) =>
    rows.map(({ name, gpu, core }) => {
      const { median } = core ?? gpu;
      return { label: name, value: median, text: times(median) };
    }),
  mark: { value: 1, text: 'as long' },
};

const server: Section<ServerResult> = {
  head: [
    ...['model', 'clients', 'requests a second', 'over one client', 'p50 ms', 'p95 ms', 'p99 ms'],
    ...['requests a forward', 'forward ms', 'beside it ms'],
  ],
  rows: ({ model, size, images, rows }) =>
    rows.map((row) => [
      ...[`${model}, ${size}x${size}, ${images} images`, String(row.clients)],
      ...[fixed(row.requestsPerSecond, 2), times(row.overSerial)],
      ...[fixed(row.latencyMs.p50), fixed(row.latencyMs.p95), fixed(row.latencyMs.p99)],
      ...[fixed(row.meanBatch), fixed(row.gpuMs), fixed(row.besideMs)],
    ]),
  title: 'Requests a second of a server by clients, over those of one client',
  bars: ({ model, size, rows }) =>
    rows.map(({ clients, overSerial, requestsPerSecond }) => ({
      label: `${model} ${size}x${size}, ${clients} ${clients === 1 ? 'client' : 'clients'}`,
      value: overSerial,
      text: `${times(overSerial)}, ${fixed(requestsPerSecond, 1)} a second`,
    })),
};

const peers: Section<{ readonly rows: readonly PeerRow[] }> = {
  head: [
    ...['work', 'peer', 'peer ms', 'ours stored as', 'ours ms', 'peer / ours', 'quartiles'],
    ...['by processor time', 'difference of results'],
  ],
  rows: ({ rows }) =>
    rows.map((row) => [
      ...[row.work, row.peer, fixed(row.peerMs, row.peerMs < 10 ? 2 : 1), row.storage],
      ...[fixed(row.oursMs, row.oursMs < 10 ? 2 : 1), times(row.ratio.median)],
      ...[`${fixed(row.ratio.low, 2)} to ${fixed(row.ratio.high, 2)}`, times(row.coreRatio.median)],
      row.difference.toExponential(1),
    ]),
  title: 'Time of peers on the same adapter over ours (f16 storage)',
  bars: ({ rows }) =>
    rows
      .filter(({ peer, storage }) => storage === 'f16' && !peer.endsWith('CPU'))
      .map(({ work, peer, ratio }) => ({
        label: `${work}, ${peer}`,
        value: ratio.median,
        text: times(ratio.median),
      })),
  mark: { value: 1, text: 'as fast' },
};

/** The newest first. */
function resultsOf<T>(bench: string): readonly Result<T>[] {
  if (!existsSync(RESULTS)) return [];
  return readdirSync(RESULTS)
    .filter((name) => name.endsWith('.json'))
    .map((name) => JSON.parse(readFileSync(RESULTS + name, 'utf8')) as Result<T>)
    .filter((result) => result.bench === bench)
    .sort((a, b) => b.at.localeCompare(a.at));
}

const line = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`;

function tableOf<T>(section: Section<T>, result: Result<T>): string {
  const { commit, device, cpu, cores, node, at, loadAverage } = result;
  const from = `Commit ${commit}, ${at.slice(0, 10)}; ${device}, ${cores} cores of ${cpu}, Node ${node}; load average before ${fixed(loadAverage)}.`;
  const rows = [section.head, section.head.map(() => '---'), ...section.rows(result)];
  return [from, '', ...rows.map(line)].join('\n');
}

/** The text between the section's marks, and its plot. */
function filled<T>(text: string, bench: string, section: Section<T>): string {
  const results = resultsOf<T>(bench);
  const [open, close] = [`<!-- ${bench} -->`, `<!-- /${bench} -->`];
  const [begin, end] = [text.indexOf(open), text.indexOf(close)];
  if (begin < 0 || end < begin)
    throw new Error(`docs/PERFORMANCE.md lacks "${open}" with "${close}" behind it`);
  const parts = results.map((result) => tableOf(section, result));
  const all = results.flatMap((result) => section.bars(result));
  // Of what was measured again, the newest.
  const bars = all.filter(({ label }, i) => all.findIndex((bar) => bar.label === label) === i);
  if (bars.length > 0) {
    writeFileSync(`${DOCS}performance-${bench}.svg`, barsOf(section.title, bars, section.mark));
    parts.unshift(`![${section.title}](performance-${bench}.svg)`);
  }
  const body = parts.length > 0 ? parts.join('\n\n') : 'Not measured yet.';
  return `${text.slice(0, begin + open.length)}\n${body}\n${text.slice(end)}`;
}

export function report(): void {
  const path = `${DOCS}PERFORMANCE.md`;
  let text = readFileSync(path, 'utf8');
  text = filled(text, 'kernels', kernels);
  text = filled(text, 'unet', unet);
  text = filled(text, 'load', load);
  text = filled(text, 'lora', lora);
  text = filled(text, 'server', server);
  text = filled(text, 'peers', peers);
  writeFileSync(path, text);
  console.log(`wrote ${path} and its plots from ${RESULTS}`);
}
