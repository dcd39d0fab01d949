#!/usr/bin/env node
/**
 * The command line: `unetd serve`, `tune`, `top`, `devices` and `models`. Reads options, starts things, prints; every failure is one
 * sentence on standard error and exit code 1.
 */
import { Command, Option } from 'commander';
import { EngineProcess } from './engine/process.ts';
import { defaultTuningFile, readTunings } from './engine/tuning.ts';
import { UnetdError } from './errors.ts';
import { sizeText } from './format.ts';
import { SafetensorsFile } from './safetensors.ts';
import { type FoundFile, listFiles, openFolders } from './server/folders.ts';
import { checkListen } from './server/guard.ts';
import { createLog, type Logger } from './server/log.ts';
import { type RunningServer, serve, serverName } from './server/serve.ts';
import {
  applyFile,
  count,
  modelsOption,
  type Settings,
  serveOptions,
  strangeVariables,
  tuneOptions,
} from './settings.ts';
import { type TopOptions, top } from './top.ts';
import type { TuneFlags } from './tune/command.ts';
import { inspectUNet } from './unet/detect.ts';

async function runServe(settings: Settings): Promise<void> {
  const { models = [], loras = [], allowHost = [], allowOrigin = [] } = settings;
  const log = createLog(settings.logLevel);
  for (const name of strangeVariables(process.env)) log.warn({ name }, 'no setting has this name: ignored');
  if (models.length === 0) {
    throw new UnetdError(
      'ERR_BAD_REQUEST',
      'No folder of models: give --models, UNETD_MODELS, or "models" in the file of --config.',
    );
  }
  // What can be refused at once should not wait for the GPU.
  checkListen(settings.host, settings.token);
  await openFolders(models, loras);
  const engine = await EngineProcess.start({
    engine: {
      maxBatch: settings.maxBatch,
      tuning: tuningOf(settings, log),
      ...(settings.adapter === undefined ? {} : { adapter: settings.adapter }),
      ...(settings.memoryBudget === undefined ? {} : { memoryBudgetBytes: settings.memoryBudget }),
    },
    log: (line) => log.warn(line),
    // What drivers print; the last words of an engine that dies are in the error anyway.
    output: (line) => log.debug({ from: 'engine' }, line),
    ...(settings.hangSeconds === 0 ? {} : { hangMs: settings.hangSeconds * 1000 }),
    ...(settings.engineModule === undefined ? {} : { module: settings.engineModule }),
  });
  let server: RunningServer;
  try {
    server = await serve({
      engine,
      log,
      models,
      loras,
      host: settings.host,
      port: settings.port,
      ...(settings.token === undefined ? {} : { token: settings.token }),
      dtype: settings.dtype,
      maxBatch: settings.maxBatch,
      batchWaitMs: settings.batchWaitMs,
      queueLimit: settings.queueLimit,
      maxConnections: settings.maxConnections,
      uploadQuotaBytes: settings.uploadQuota,
      allowHosts: allowHost,
      allowOrigins: allowOrigin,
      drainMs: settings.drainSeconds * 1000,
    });
  } catch (error) {
    await engine.close();
    throw error;
  }
  endOnSignal(server, engine, log);
  const { name: device, backend, tuned } = engine.device;
  log.info({ device, backend, ...(tuned === undefined ? {} : { tuned }), url: server.url }, serverName());
  process.stdout.write(`unetd listening on ${server.url}\n`);
}

/** The file of measured choices, unless it is of no use. */
function tuningOf({ tuning }: Settings, log: Logger): string | false {
  const path = tuning ?? defaultTuningFile();
  try {
    const tunings = readTunings(path);
    if (tunings === undefined && tuning !== undefined)
      log.warn({ path }, 'the file of --tuning cannot be read');
    return tunings === undefined ? false : path;
  } catch (error) {
    log.warn(`${UnetdError.from(error).message}; kernels are chosen by rules`);
    return false;
  }
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
    process.stdout.write(`${file.name}\t${sizeText(file.sizeBytes)}\t${await architecture(file)}\n`);
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

interface TopFlags extends Omit<TopOptions, 'intervalMs'> {
  readonly interval: number;
}

function addServe(root: Command): void {
  const command = root
    .command('serve')
    .description('run the server')
    .addOption(
      new Option(
        '--config <file>',
        'JSON file of these settings, under the names of the flags in camelCase',
      ).env('UNETD_CONFIG'),
    );
  for (const option of serveOptions()) command.addOption(option);
  command
    .addOption(new Option('--engine-module <url>').hideHelp())
    .hook('preAction', () => {
      const { config } = command.opts<{ readonly config?: string }>();
      if (config !== undefined) applyFile(command, config);
    })
    .action(runServe);
}

function addTune(root: Command): void {
  const command = root
    .command('tune')
    .description('measure which kernels are the fastest on this GPU, for servers to use');
  for (const option of tuneOptions()) command.addOption(option);
  command.action(async (flags: TuneFlags) => {
    // Loads the native WebGPU bindings, as `runDevices` does.
    const { runTune } = await import('./tune/command.ts');
    await runTune(flags);
  });
}

function addTop(root: Command): void {
  root
    .command('top')
    .description('show what a running server does')
    .addOption(
      new Option('--url <url>', 'address of the server').default('ws://127.0.0.1:8700/v1').env('UNETD_URL'),
    )
    .addOption(new Option('--token <token>', 'its bearer token').env('UNETD_TOKEN'))
    .addOption(
      new Option('--interval <seconds>', 'time between two looks').argParser(count(1, 3600)).default(1),
    )
    .option('--once', 'show one screen and end', false)
    .option('--json', 'print the statistics as JSON, one line a look', false)
    .action(({ interval, ...flags }: TopFlags) => top({ ...flags, intervalMs: interval * 1000 }));
}

function program(): Command {
  const [name = 'unetd', version = '0'] = serverName().split('/');
  const root = new Command(name)
    .description('Holds diffusion UNets on the GPU and serves their forwards, with LoRAs per request.')
    .version(version)
    .showHelpAfterError('(--help shows all options)');
  addServe(root);
  addTune(root);
  addTop(root);
  root.command('devices').description('list the GPU adapters').action(runDevices);
  root
    .command('models')
    .description('list the models in folders')
    .addOption(modelsOption().makeOptionMandatory())
    .action(async (flags: { readonly models: readonly string[] }) => runModels(flags));
  return root;
}

try {
  await program().parseAsync();
} catch (error) {
  process.stderr.write(`unetd: ${error instanceof Error ? error.message : String(error)}\n`);
  process.exitCode = 1;
}
