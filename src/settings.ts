/**
 * The settings of `unetd serve`, and those of `unetd tune` beside them: one table of options each, and where their values come
 * from. Flags win over the environment (`UNETD_*`), that over a JSON file (`--config`), that over the defaults. Starts nothing.
 */
import { readFileSync } from 'node:fs';
import { delimiter } from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { STORAGE_CHOICES } from './engine/types.ts';
import { UnetdError } from './errors.ts';
import { LOG_LEVELS, type LogLevel } from './server/log.ts';
import type { DtypeChoice } from './server/protocol.ts';
import { DEFAULTS } from './server/serve.ts';
import { parseStrictJson, type StrictJson, type StrictJsonObject } from './strict-json.ts';
import { ARCHITECTURE_NAMES } from './tune/stand-in.ts';

/** Their names are those of the flags in camel case, and the keys of the file. */
export interface Settings {
  readonly models?: readonly string[];
  readonly loras?: readonly string[];
  readonly host: string;
  readonly port: number;
  readonly token?: string;
  readonly dtype: DtypeChoice;
  readonly memoryBudget?: number;
  readonly maxBatch: number;
  readonly batchWaitMs: number;
  readonly queueLimit: number;
  readonly maxConnections: number;
  readonly uploadQuota: number;
  readonly allowHost?: readonly string[];
  readonly allowOrigin?: readonly string[];
  readonly adapter?: string;
  readonly tuning?: string;
  readonly drainSeconds: number;
  /** 0 for what suits the adapter. */
  readonly hangSeconds: number;
  readonly logLevel: LogLevel;
  /** File URL of another engine, for tests of everything above it. */
  readonly engineModule?: string;
}

const UNITS: Readonly<Record<string, number>> = {
  '': 1,
  b: 1,
  kb: 1e3,
  mb: 1e6,
  gb: 1e9,
  kib: 1024,
  mib: 1024 ** 2,
  gib: 1024 ** 3,
};

/** `12GiB` */
function bytes(text: string): number {
  const [, count = '', unit = ''] = /^([\d.]+)\s*([a-z]*)$/i.exec(text) ?? [];
  const value = Math.floor(Number(count) * (UNITS[unit.toLowerCase()] ?? Number.NaN));
  if (count !== '' && Number.isSafeInteger(value) && value > 0) return value;
  throw new InvalidArgumentError('Give a number of bytes like 12GiB or 800MB.');
}

/** A parser of whole numbers from `from` to `to`. */
export function count(from: number, to: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (text.trim() !== '' && Number.isInteger(value) && value >= from && value <= to) return value;
    throw new InvalidArgumentError(`Give a whole number from ${from} to ${to}.`);
  };
}

/** An option that may be given several times, or once with several values between separators. */
function listOption(flags: string, separator: string, what: string): Option {
  const collect = (value: string, before: readonly string[] | undefined): readonly string[] => [
    ...(before ?? []),
    ...value.split(separator).filter((part) => part !== ''),
  ];
  return new Option(flags, `${what} (several: repeat it, or separate with "${separator}")`).argParser(
    collect,
  );
}

export function modelsOption(): Option {
  return listOption('--models <dir...>', delimiter, 'folder of models, plain or as ComfyUI lays it out');
}

/** All options of `unetd serve`, each with its variable of the environment. */
export function serveOptions(): readonly Option[] {
  const numbers = (flags: string, what: string, parse: (text: string) => number, preset: number): Option =>
    new Option(flags, what).argParser(parse).default(preset);
  const options = [
    modelsOption(),
    listOption('--loras <dir...>', delimiter, 'folder of LoRAs'),
    new Option('--host <host>', 'address to listen on').default(DEFAULTS.host),
    numbers('--port <port>', 'port to listen on, 0 for any', count(0, 65_535), DEFAULTS.port),
    new Option('--token <token>', 'bearer token that clients must send; needed off loopback'),
    new Option('--dtype <dtype>', 'storage of weights and activations')
      .choices(STORAGE_CHOICES)
      .default('auto'),
    new Option('--memory-budget <bytes>', 'GPU memory to use, like 12GiB').argParser(bytes),
    numbers('--max-batch <images>', 'most images of one forward', count(1, 1024), DEFAULTS.maxBatch),
    numbers('--batch-wait-ms <ms>', 'how long a request waits for others to join it', count(0, 60_000), 0),
    numbers('--queue-limit <requests>', 'most requests that wait', count(1, 1_000_000), DEFAULTS.queueLimit),
    numbers(
      '--max-connections <count>',
      'most WebSocket connections',
      count(1, 100_000),
      DEFAULTS.maxConnections,
    ),
    numbers('--upload-quota <bytes>', 'disk space for uploaded files', bytes, DEFAULTS.uploadQuotaBytes),
    listOption('--allow-host <name...>', ',', 'further name clients may use for this server'),
    listOption('--allow-origin <origin...>', ',', 'web page that may connect'),
    new Option('--adapter <name>', 'part of the name of the GPU to use'),
    new Option('--tuning <file>', 'what "unetd tune" measured; in the user\'s cache unless told'),
    numbers(
      '--drain-seconds <seconds>',
      'how long an ending server works on open requests',
      count(0, 86_400),
      DEFAULTS.drainMs / 1000,
    ),
    numbers(
      '--hang-seconds <seconds>',
      'how long the GPU may take over a forward at most before the engine is restarted, 0 for what suits it',
      count(0, 86_400),
      0,
    ),
    new Option('--log-level <level>', 'what to log').choices(LOG_LEVELS).default('info'),
  ];
  for (const option of options) option.env(variableOf(option));
  return options;
}

/** Settings of a server that measuring for it takes as well. */
const SHARED: ReadonlySet<string> = new Set(['dtype', 'adapter', 'tuning']);

const images: (text: string) => number = count(1, 1024);
const pixels: (text: string) => number = count(1, 4096);

const list =
  <T>(parse: (text: string) => T) =>
  (text: string): readonly T[] =>
    text.split(',').map(parse);

function size(text: string): readonly [number, number] {
  const [height, width, more] = text.split('x');
  if (height !== undefined && width !== undefined && more === undefined)
    return [pixels(height), pixels(width)];
  throw new InvalidArgumentError('Give sizes in latent pixels, height and width, like 64x64,96x64.');
}

/** All options of `unetd tune`. */
export function tuneOptions(): readonly Option[] {
  return [
    new Option('--model <file>', 'model to measure with; random weights unless told'),
    new Option('--like <name>', 'whose shape random weights have')
      .choices(ARCHITECTURE_NAMES)
      .default('sd15'),
    new Option(
      '--size <sizes>',
      'latent pixels, like 64x64,96x64; what the model was trained for unless told',
    ).argParser(list(size)),
    new Option('--batch <images>', 'images of a forward, like 1,2')
      .argParser(list(images))
      .default([1, 2], '1,2'),
    new Option('--rounds <count>', 'measurements of each candidate').argParser(count(1, 1000)).default(5),
    ...serveOptions().filter((option) => SHARED.has(option.attributeName())),
  ];
}

/** `UNETD_MAX_BATCH` of `--max-batch`. */
function variableOf(option: Option): string {
  return `UNETD_${option.name().replaceAll('-', '_').toUpperCase()}`;
}

/** Variables of this program that are no setting of the server. */
const OTHER_VARIABLES: ReadonlySet<string> = new Set(['UNETD_CONFIG', 'UNETD_URL']);

/** Names in the environment that look like settings and are none: misspelt, perhaps. */
export function strangeVariables(
  environment: Readonly<Record<string, string | undefined>>,
): readonly string[] {
  const known = new Set(serveOptions().map(variableOf));
  return Object.keys(environment).filter(
    (name) => name.startsWith('UNETD_') && !known.has(name) && !OTHER_VARIABLES.has(name),
  );
}

/** Gives the command the values of a file, where neither a flag nor the environment has one. ERR_BAD_REQUEST. */
export function applyFile(command: Command, path: string): void {
  const options = new Map(serveOptions().map((option) => [option.attributeName(), option]));
  for (const [key, value] of readObject(path)) {
    const option = options.get(key);
    if (option === undefined)
      throw bad(path, `there is no setting "${key}"; there are ${[...options.keys()].join(', ')}`);
    const parsed = settingOf(option, value, path);
    const source = command.getOptionValueSource(key);
    if (source === undefined || source === 'default') command.setOptionValueWithSource(key, parsed, 'config');
  }
}

function readObject(path: string): StrictJsonObject {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    throw bad(
      path,
      (error as NodeJS.ErrnoException).code === 'ENOENT' ? 'there is no such file' : message(error),
    );
  }
  let json: StrictJson;
  try {
    json = parseStrictJson(text);
  } catch (error) {
    throw bad(path, message(error));
  }
  if (json instanceof Map) return json;
  throw bad(path, 'it must hold one JSON object, like {"models": ["/srv/models"]}');
}

function settingOf(option: Option, value: StrictJson, path: string): unknown {
  const key = option.attributeName();
  if (option.variadic) {
    if (Array.isArray(value) && value.every((each) => typeof each === 'string')) return value;
    throw bad(path, `"${key}" must be a list of strings`);
  }
  if (typeof value !== 'string' && typeof value !== 'number')
    throw bad(path, `"${key}" must be a string or a number`);
  try {
    return option.parseArg === undefined ? String(value) : option.parseArg(String(value), undefined);
  } catch (error) {
    throw bad(path, `"${key}" is ${JSON.stringify(value)}. ${message(error)}`);
  }
}

function bad(path: string, what: string): UnetdError {
  return new UnetdError('ERR_BAD_REQUEST', `--config ${path}: ${what.replace(/\.$/, '')}.`);
}

function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
