/** Where figures come from: commit, adapter and machine, for the head of every table and JSON file. Measures nothing. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { cpus, loadavg } from 'node:os';
import { dirname } from 'node:path';

export interface Facts {
  readonly commit: string;
  readonly device: string;
  readonly backend: string;
  readonly cpu: string;
  readonly cores: number;
  readonly node: string;
  /** Over the last minute, before anything was measured: timings are sound where it is near 0. */
  readonly loadAverage: number;
  readonly at: string;
}

const git = (...args: string[]): string => {
  try {
    return execFileSync('git', args, { encoding: 'utf8' }).trim();
  } catch {
    return '';
  }
};

export const commit = (): string =>
  (git('rev-parse', '--short', 'HEAD') || 'unknown') + (git('status', '--porcelain') ? ' + changes' : '');

/** Prints them too. */
export function factsOf({ name, backend }: { readonly name: string; readonly backend: string }): Facts {
  const facts = {
    commit: commit(),
    device: name,
    backend,
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: cpus().length,
    node: process.version,
    loadAverage: loadavg()[0]!,
    at: new Date().toISOString(),
  };
  console.log(`device ${name}, backend ${backend}, commit ${facts.commit}`);
  console.log(
    `${facts.cores} cores of ${facts.cpu}, Node ${facts.node}, load average ${facts.loadAverage.toFixed(1)}`,
  );
  return facts;
}

/** Writes a result file for `bench report`, unless no path is given. `bench`: the command. */
export function writeResult(
  path: string | undefined,
  bench: string,
  facts: Facts,
  result: Readonly<Record<string, unknown>>,
): void {
  if (path === undefined) return;
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, `${JSON.stringify({ bench, ...facts, ...result }, null, 2)}\n`);
}
