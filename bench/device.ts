/**
 * The one command for a GPU: what it is, whether kernels and whole UNets are right on its driver, its rates, and whole steps beside
 * PyTorch on the same card. Each stage is a process of its own with a time limit, since a driver can take a process down or
 * hang it; the others go on. Measures nothing itself.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { columns } from '../src/format.ts';
import { endOf, ROOT } from '../test/launch.ts';
import { answersOf, type Found, stepsOf } from './device-answers.ts';
import { RESULTS, type Stage, type StageOptions, stagesOf, TUNING } from './device-stages.ts';
import { commit } from './facts.ts';

export interface DeviceBenchOptions extends StageOptions {
  readonly only: RegExp;
  /** Of one stage. */
  readonly minutes: number;
  readonly json?: string | undefined;
}

/** How a stage went. */
export interface Outcome {
  readonly name: string;
  readonly command: string;
  readonly seconds: number;
  /** `done`, or how it ended instead. */
  readonly end: string;
  /** What it wrote, as far as it came. */
  readonly result: unknown;
}

async function run({ name, args: argsFor }: Stage, minutes: number): Promise<Outcome> {
  const path = `${RESULTS}${name.replaceAll(' ', '-')}.json`;
  const args = argsFor(path);
  const command = ['node', ...args].join(' ');
  console.log(`\n== ${name}: ${command}`);
  rmSync(path, { force: true });
  const begun = performance.now();
  const child = spawn(process.execPath, args, {
    cwd: ROOT,
    stdio: ['ignore', 'inherit', 'inherit'],
    timeout: minutes * 60_000,
    killSignal: 'SIGKILL',
  });
  const code = await endOf(child);
  const seconds = (performance.now() - begun) / 1000;
  const end = child.killed
    ? `killed after ${minutes} minutes`
    : code === 0
      ? 'done'
      : `ended with ${code ?? child.signalCode}`;
  if (end !== 'done') console.log(`== ${name} ${end}; going on`);
  return { name, command, seconds, end, result: readJson(path) };
}

function readJson(path: string): unknown {
  try {
    return JSON.parse(readFileSync(path, 'utf8'));
  } catch {
    // The stage did not come as far as that, or writes none.
    return undefined;
  }
}

interface Facts {
  readonly commit: string;
  readonly quick: boolean;
}

/** Of a run of the same commit that came before in the same file: a long run may be had in parts. */
function formerOutcomes(json: string, { commit: at, quick }: Facts): readonly Outcome[] {
  const former = readJson(json) as (Facts & { readonly stages: readonly Outcome[] }) | undefined;
  return former?.commit === at && former.quick === quick ? former.stages : [];
}

const print = (rows: readonly (readonly string[])[]): void => console.log(`\n${columns(rows).trimEnd()}`);

export async function benchDevice(options: DeviceBenchOptions): Promise<void> {
  const { quick = false, only, minutes, json = `${RESULTS}device.json` } = options;
  for (const folder of [RESULTS, dirname(json)]) mkdirSync(folder, { recursive: true });
  const stages = stagesOf(options).filter(({ name }) => only.test(name));
  const facts = { bench: 'device', commit: commit(), at: new Date().toISOString(), quick };
  if (stages.some(({ name }) => name.endsWith('tuning'))) rmSync(TUNING, { force: true });
  const found = new Map(formerOutcomes(json, facts).map((outcome) => [outcome.name, outcome]));
  for (const stage of stages) {
    found.set(stage.name, await run(stage, minutes));
    const all = { ...facts, answers: answersOf(found), stages: [...found.values()] };
    // What is known stays, whatever becomes of the next stage.
    writeFileSync(json, `${JSON.stringify(all, null, 2)}\n`);
  }
  show(found, json);
}

function show(found: Found, json: string): void {
  console.log(`\n== all of it, in ${json}`);
  const outcomes = [...found.values()].map(({ name, seconds, end }) => [name, seconds.toFixed(0), end]);
  print([['stage', 'seconds', 'end'], ...outcomes]);
  print(answersOf(found).map(({ question, answer }) => [question, answer]));
  print(stepsOf(found));
}
