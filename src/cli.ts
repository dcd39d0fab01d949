#!/usr/bin/env node
/**
 * The command line: `unetd serve`, `unetd devices`, `unetd models`. Reads options, starts things, prints; every failure is one
 * sentence on standard error and exit code 1.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import { EngineProcess } from './engine/process.ts';
import { UnetdError } from './errors.ts';
import { SafetensorsFile } from './safetensors.ts';
import { type FoundFile, listFiles, openFolders } from './server/folders.ts';
import { checkListen } from './server/guard.ts';
import { createLog, LOG_LEVELS, type Logger, type LogLevel } from './server/log.ts';
import type { DtypeChoice } from './server/protocol.ts';
import { DEFAULTS, type RunningServer, serve, serverName } from './server/serve.ts';
import { inspectUNet } from './unet/detect.ts';

interface ServeFlags {
  readonly models: readonly string[];
  readonly loras: readonly string[];
  readonly host: string;
  readonly port: number;
  readonly token?: string;
  readonly dtype: DtypeChoice;
  readonly memoryBudget?: number;
  readonly maxBatch: number;
  readonly batchWaitMs: number;
  readonly queueLimit: number;
  readonly uploadQuota: number;
  readonly allowHost: readonly string[];
  readonly allowOrigin: readonly string[];
  readonly adapter?: string;
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

function bytes(text: string): number {
  const [, count = '', unit = ''] = /^([\d.]+)\s*([a-z]*)$/i.exec(text) ?? [];
  const value = Math.floor(Number(count) * (UNITS[unit.toLowerCase()] ?? Number.NaN));
  if (count !== '' && Number.isSafeInteger(value) && value > 0) return value;
  throw new InvalidArgumentError('Give a number of bytes like 12GiB or 800MB.');
}

/** A parser of whole numbers from `from` to `to`. */
function count(from: number, to: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (text.trim() !== '' && Number.isInteger(value) && value >= from && value <= to) return value;
    throw new InvalidArgumentError(`Give a whole number from ${from} to ${to}.`);
  };
}

function collect(value: string, before: readonly string[] | undefined): readonly string[] {
  return [...(before ?? []), value];
}

/** `12.3 GiB` */
function size(value: number): string {
  const unit = value >= UNITS.gib! ? 'GiB' : 'MiB';
  return `${(value / UNITS[unit.toLowerCase()]!).toFixed(value >= 10 * UNITS.mib! ? 1 : 2)} ${unit}`;
}

async function runServe(flags: ServeFlags): Promise<void> {
  const log = createLog(flags.logLevel);
  // What can be refused at once should not wait for the GPU.
  checkListen(flags.host, flags.token);
  await openFolders(flags.models, flags.loras);
  const engine = await EngineProcess.start({
    engine: {
      maxBatch: flags.maxBatch,
      ...(flags.adapter === undefined ? {} : { adapter: flags.adapter }),
      ...(flags.memoryBudget === undefined ? {} : { memoryBudgetBytes: flags.memoryBudget }),
    },
    log: (line) => log.warn(line),
    // What drivers print; the last words of an engine that dies are in the error anyway.
    output: (line) => log.debug({ from: 'engine' }, line),
    ...(flags.engineModule === undefined ? {} : { module: flags.engineModule }),
  });
  let server: RunningServer;
  try {
    server = await serve({
      engine,
      log,
      models: flags.models,
      loras: flags.loras,
      host: flags.host,
      port: flags.port,
      ...(flags.token === undefined ? {} : { token: flags.token }),
      dtype: flags.dtype,
      maxBatch: flags.maxBatch,
      batchWaitMs: flags.batchWaitMs,
      queueLimit: flags.queueLimit,
      uploadQuotaBytes: flags.uploadQuota,
      allowHosts: flags.allowHost,
      allowOrigins: flags.allowOrigin,
    });
  } catch (error) {
    await engine.close();
    throw error;
  }
  endOnSignal(server, engine, log);
  log.info({ device: engine.device.name, backend: engine.device.backend }, serverName());
  process.stdout.write(`unetd listening on ${server.url}\n`);
}

/** The first signal drains, the second ends at once. */
function endOnSignal(server: RunningServer, engine: EngineProcess, log: Logger): void {
  let ending = false;
  const onSignal = (signal: NodeJS.Signals): void => {
    if (ending) process.exit(1);
    ending = true;
    log.info({ signal }, 'finishing open requests; a second signal ends at once');
    void server
      .drain()
      .then(() => engine.close())
      .then(() => process.exit(0));
  };
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
}

async function runDevices(): Promise<void> {
  // Loads the native WebGPU bindings, which the other commands do not need in this process.
  const { listAdapters } = await import('./gpu/device.ts');
  const adapters = await listAdapters();
  if (adapters.length === 0) {
    throw new UnetdError(
      'ERR_NO_ADAPTER',
      "No GPU adapter was found: install a Vulkan driver, or Mesa's software driver.",
    );
  }
  for (const { name, backend } of adapters) process.stdout.write(`${name}\t${backend}\n`);
}

async function runModels({ models }: { readonly models: readonly string[] }): Promise<void> {
  const folders = await openFolders(models, []);
  const files = await listFiles(folders, 'model');
  for (const file of files) {
    process.stdout.write(`${file.name}\t${size(file.sizeBytes)}\t${await architecture(file)}\n`);
  }
  if (files.length === 0) process.stderr.write(`No .safetensors files in ${models.join(', ')}.\n`);
}

/** What kind of UNet the header shows, or why it is none. */
async function architecture({ path }: FoundFile): Promise<string> {
  try {
    const file = await SafetensorsFile.open(path);
    try {
      const shapes = new Map([...file.tensors].map(([name, { shape }]) => [name, shape]));
      const { config, layout } = inspectUNet(shapes);
      const y = config.admChannels === null ? '' : `, y ${config.admChannels}`;
      return `UNet (${layout}), ${config.inChannels} channels in, width ${config.modelChannels}, context ${config.contextDim}${y}`;
    } finally {
      await file.close();
    }
  } catch (error) {
    return UnetdError.from(error).message;
  }
}

/** An option that may be given several times. */
function listOption(flags: string, what: string): Option {
  return new Option(flags, `${what} (repeatable)`).argParser(collect);
}

function program(): Command {
  const [name = 'unetd', version = '0'] = serverName().split('/');
  const root = new Command(name)
    .description('Holds diffusion UNets on the GPU and serves their forwards, with LoRAs per request.')
    .version(version)
    .showHelpAfterError('(--help shows all options)');
  const models = (): Option =>
    listOption(
      '--models <dir...>',
      'folder of models, plain or as ComfyUI lays it out',
    ).makeOptionMandatory();
  root
    .command('serve')
    .description('run the server')
    .addOption(models())
    .addOption(listOption('--loras <dir...>', 'folder of LoRAs').default([], 'none'))
    .option('--host <host>', 'address to listen on', DEFAULTS.host)
    .option('--port <port>', 'port to listen on, 0 for any', count(0, 65_535), DEFAULTS.port)
    .addOption(new Option('--token <token>', 'bearer token that clients must send').env('UNETD_TOKEN'))
    .addOption(
      new Option('--dtype <dtype>', 'storage of weights and activations')
        .choices(['auto', 'f32', 'f16'])
        .default('auto'),
    )
    .option('--memory-budget <bytes>', 'GPU memory to use, like 12GiB', bytes)
    .option('--max-batch <images>', 'most images of one forward', count(1, 1024), DEFAULTS.maxBatch)
    .option('--batch-wait-ms <ms>', 'how long a request waits for others to join it', count(0, 60_000), 0)
    .option('--queue-limit <requests>', 'most requests that wait', count(1, 1_000_000), DEFAULTS.queueLimit)
    .option('--upload-quota <bytes>', 'disk space for uploaded files', bytes, DEFAULTS.uploadQuotaBytes)
    .addOption(
      listOption('--allow-host <name>', 'further name clients may use for this server').default([], 'none'),
    )
    .addOption(listOption('--allow-origin <origin>', 'web page that may connect').default([], 'none'))
    .option('--adapter <name>', 'part of the name of the GPU to use')
    .addOption(new Option('--log-level <level>', 'what to log').choices(LOG_LEVELS).default('info'))
    .addOption(new Option('--engine-module <url>').hideHelp())
    .action(async (flags: ServeFlags) => runServe(flags));
  root.command('devices').description('list the GPU adapters').action(runDevices);
  root
    .command('models')
    .description('list the models in folders')
    .addOption(models())
    .action(async (flags: { readonly models: readonly string[] }) => runModels(flags));
  return root;
}

try {
  await program().parseAsync();
} catch (error) {
  process.stderr.write(`unetd: ${error instanceof Error ? error.message : String(error)}\n`);
  process.exitCode = 1;
}
