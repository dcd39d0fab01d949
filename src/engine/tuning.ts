/**
 * The choices of kernels that were measured on adapters, as a JSON file: one entry an adapter, with its driver and the kernels
 * that were measured. An entry counts only where all of these are the same still. Measures nothing (`src/tune/` does).
 */
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { UnetdError } from '../errors.ts';
import type { Device } from '../gpu/device.ts';
import type { Choice, Choices } from '../gpu/kernel.ts';
import { SHADERS } from '../gpu/link.ts';
import { KERNELS } from '../kernels/index.ts';
import { parseStrictJson, type StrictJson } from '../strict-json.ts';

/** What measured times hold for. */
export interface TunedFor {
  /** The hardware, and the driver with its version, as the adapter names them. */
  readonly hardware: string;
  readonly driver: string;
  /** Of the kernels, see `kernelRevision`. */
  readonly revision: string;
}

export interface Tuning extends TunedFor {
  /** Those that are better than what the rules say. */
  readonly choices: Choices;
}

/** What measuring came to, by point: undefined where the rules shall choose. */
export type Measured = ReadonlyMap<string, Choice | undefined>;

/** All of them must agree. */
const FIELDS = ['hardware', 'driver', 'revision'] as const;

/** `tuning.json` in the user's folder for what can be made again. */
export function defaultTuningFile(
  env: Readonly<Record<string, string | undefined>> = process.env,
  platform: NodeJS.Platform = process.platform,
): string {
  const own: Partial<Record<NodeJS.Platform, string>> = {
    darwin: join(homedir(), 'Library', 'Caches'),
    win32: env.LOCALAPPDATA || join(homedir(), 'AppData', 'Local'),
  };
  const cache = env.XDG_CACHE_HOME || own[platform] || join(homedir(), '.cache');
  return join(cache, 'unetd', 'tuning.json');
}

/** Changes whenever a shader or the description of a kernel does: times of other kernels say nothing of these. */
export function kernelRevision(): string {
  const hash = createHash('sha256').update(JSON.stringify(KERNELS));
  const files = readdirSync(SHADERS, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name));
  for (const file of files.sort()) hash.update(readFileSync(file));
  return hash.digest('hex').slice(0, 16);
}

/** The entries of a file; undefined where none can be read. ERR_BAD_REQUEST, naming the file, where it is broken. */
export function readTunings(path: string): readonly Tuning[] | undefined {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch {
    return undefined;
  }
  try {
    return list(parseStrictJson(text)).map(tuningOf);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new UnetdError('ERR_BAD_REQUEST', `${path} is no file that "unetd tune" wrote: ${why}`);
  }
}

/**
 * What is known of an adapter from the file; undefined where it was not measured. A broken file is named in a warning, and taken
 * for none.
 */
export function tunedChoices(
  adapter: Device['adapter'],
  path: string | false = defaultTuningFile(),
): Choices | undefined {
  let tunings: readonly Tuning[] = [];
  try {
    tunings = (path !== false && readTunings(path)) || [];
  } catch (error) {
    process.emitWarning(`${(error as Error).message}; kernels are chosen by rules`, 'unetd');
  }
  return tunings.length === 0 ? undefined : choicesFor(tunings, tunedFor(adapter));
}

export const tunedFor = ({ hardware, driver }: Device['adapter']): TunedFor => ({
  hardware,
  driver,
  revision: kernelRevision(),
});

/** What was measured for exactly this. */
export const choicesFor = (tunings: readonly Tuning[], wanted: TunedFor): Choices | undefined =>
  tunings.find((tuning) => FIELDS.every((field) => tuning[field] === wanted[field]))?.choices;

/**
 * What the file holds once `measured` is in it: choices of an entry's other points stay, and an adapter has no entry for other
 * drivers or kernels than its present ones.
 */
export function withTuning(
  tunings: readonly Tuning[],
  { hardware, driver, revision }: TunedFor,
  measured: Measured,
): readonly Tuning[] {
  const before = choicesFor(tunings, { hardware, driver, revision }) ?? [];
  const others = tunings.filter((tuning) => tuning.hardware !== hardware);
  const choices = new Map<string, Choice>();
  for (const [point, choice] of new Map<string, Choice | undefined>([...before, ...measured]))
    if (choice) choices.set(point, choice);
  return [...others, { hardware, driver, revision, choices }];
}

/** Whole or not at all. */
export function writeTunings(path: string, tunings: readonly Tuning[]): void {
  mkdirSync(dirname(path), { recursive: true });
  const entries = tunings.map(({ choices, ...rest }) => ({
    ...rest,
    choices: Object.fromEntries([...choices].sort(([a], [b]) => (a < b ? -1 : 1))),
  }));
  writeFileSync(`${path}.part`, `${JSON.stringify(entries, null, 2)}\n`);
  renameSync(`${path}.part`, path);
}

function list(json: StrictJson): readonly StrictJson[] {
  if (Array.isArray(json)) return json;
  throw new Error('it holds no list');
}

function object(json: StrictJson | undefined, what: string): ReadonlyMap<string, StrictJson> {
  if (json instanceof Map) return json;
  throw new Error(`${what} is no object`);
}

function tuningOf(json: StrictJson): Tuning {
  const entry = object(json, 'an entry');
  const [hardware, driver, revision] = FIELDS.map((field) => {
    const value = entry.get(field);
    if (typeof value === 'string') return value;
    throw new Error(`"${field}" of an entry is no string`);
  }) as [string, string, string];
  const choices = [...object(entry.get('choices'), '"choices" of an entry')];
  return {
    hardware,
    driver,
    revision,
    choices: new Map(choices.map(([point, choice]) => [point, choiceOf(choice, point)])),
  };
}

/** Whether the adapter knows such a choice is seen when it is looked up: one that is no candidate is never taken. */
function choiceOf(json: StrictJson, point: string): Choice {
  const choice: Record<string, unknown> = Object.fromEntries(object(json, `the choice of "${point}"`));
  if (typeof choice.variant === 'string') return { ...choice, variant: choice.variant };
  throw new Error(`the choice of "${point}" names no variant`);
}
