/** The benchmark's command line: `npm run bench kernels -- [--filter RE] [--json FILE] ...`. Measures nothing itself. */
import { Command, Option } from 'commander';
import { benchDevice } from './device.ts';
import { FULL_MODELS } from './full-size.ts';
import { benchKernels } from './kernels.ts';
import { benchLoad } from './load.ts';
import { benchLora } from './lora.ts';
import { benchPeers } from './peers.ts';
import { benchProbe } from './probe.ts';
import { report } from './report.ts';
import { benchServer } from './server.ts';
import { benchTransport } from './transport.ts';
import { benchUNet } from './unet.ts';

const counts = (text: string): readonly number[] => text.split(',').map(Number);
const models = Object.keys(FULL_MODELS);

const program = new Command('bench').description('Benchmarks; each prints device, driver and commit.');

program
  .command('kernels')
  .description('every kernel at the shapes of SD 1.5, against the peaks of the adapter')
  .option('--filter <pattern>', 'only shapes whose name matches this regular expression')
  .option('--json <file>', 'also write the numbers there')
  .addOption(new Option('--storage <dtype>', 'one storage instead of both').choices(['f32', 'f16']))
  .option('--variant <name>', 'force this variant where a kernel has it')
  .option('--adapter <name>', 'part of the name of the adapter')
  .action(async (options) => {
    await benchKernels({
      json: options.json,
      filter: options.filter ? new RegExp(options.filter) : undefined,
      storages: options.storage ? [options.storage] : ['f32', 'f16'],
      variant: options.variant,
      adapter: options.adapter,
    });
  });

program
  .command('device')
  .description('all that a new GPU is asked: facts, correctness, rates, kernels, whole steps beside PyTorch')
  .option('--quick', 'small sizes and few rounds, to see on any adapter that it runs')
  .option('--only <pattern>', 'only stages whose name matches this regular expression')
  .option('--python <path>', 'an interpreter that has PyTorch and what ComfyUI imports')
  .option('--minutes <count>', 'the longest that a stage may take', Number, 15)
  .option('--json <file>', 'where to write everything; .cache/bench/device/device.json unless given')
  .option('--adapter <name>', 'part of the name of the adapter')
  .action(({ only, ...options }) => benchDevice({ ...options, only: new RegExp(only ?? '') }));

program
  .command('probe')
  .description(
    'what the adapter is and does below any model: facts, rates of matrix units, cost of a dispatch',
  )
  .option('--quick', 'small sizes')
  .option('--json <file>', 'also write the numbers there')
  .option('--adapter <name>', 'part of the name of the adapter')
  .action(benchProbe);

program
  .command('unet')
  .description('forwards of a full-size UNet: time by kernel, dispatches, encoding, share of the peak')
  .addOption(new Option('--model <name>', 'which UNet').choices(models).default('sd15'))
  .option('--size <pixels,...>', 'latent pixels a side', counts, [16, 32, 64])
  .option('--batch <images,...>', 'images of a forward', counts, [1, 2, 4])
  .option('--rounds <count>', 'how many forwards of each', Number, 5)
  .addOption(new Option('--storage <dtype>', 'how tensors are stored').choices(['f32', 'f16']).default('f16'))
  .option('--tuning <file>', 'choices that `unetd tune` measured; by rules alone unless given')
  .option('--json <file>', 'also write the numbers there')
  .option('--adapter <name>', 'part of the name of the adapter')
  .action(async ({ size, batch, ...options }) => {
    await benchUNet({ ...options, sizes: size, batches: batch });
  });

program
  .command('load')
  .description('from a file to the GPU, beside reading the file and copying as many bytes')
  .addOption(new Option('--model <name>', 'which UNet').choices(models).default('sd15'))
  .option('--dtype <dtype,...>', 'how weights are stored', (text) => text.split(','), ['f16', 'q8_0'])
  .option('--rounds <count>', 'how many loads of each', Number, 3)
  .option('--json <file>', 'also write the numbers there')
  .option('--adapter <name>', 'part of the name of the adapter')
  .action(({ dtype, ...options }) => benchLoad({ ...options, dtypes: dtype }));

program
  .command('lora')
  .description('what LoRAs cost on a full-size SD 1.5 forward: by rank, in mixed batches, when switched')
  .option('--size <pixels>', 'latent pixels a side', Number, 32)
  .option('--rounds <count>', 'how many pairs of each comparison', Number, 5)
  .option('--switches <count>', 'how many changes of adapter', Number, 100)
  .option('--filter <pattern>', 'only rows whose name matches this regular expression')
  .option('--json <file>', 'also write the numbers there')
  .option('--adapter <name>', 'part of the name of the adapter')
  .action(async ({ filter, ...options }) => {
    await benchLora({ ...options, filter: new RegExp(filter ?? '') });
  });

program
  .command('peers')
  .description('the same works by other engines on this machine, which it installs, and here')
  .option('--filter <pattern>', 'only works whose name matches this regular expression')
  .option('--peers <pattern>', 'only peers whose name matches this regular expression')
  .option('--steps', 'instead: steps of two images for a GPU, SD 1.5 at 512x512 and SDXL at 1024x1024')
  .option(
    '--python <path>',
    'an interpreter that has PyTorch and what ComfyUI imports; installed unless given',
  )
  .option('--tuning <file>', 'choices that `unetd tune` measured, for ours; by rules alone unless given')
  .option('--rounds <count>', 'how many times each runs', Number, 5)
  .option('--json <file>', 'also write the numbers there')
  .option('--adapter <name>', 'part of the name of the adapter; the peers take the first')
  .action(async ({ filter, peers, ...options }) => {
    await benchPeers({ ...options, filter: new RegExp(filter ?? ''), peers: new RegExp(peers ?? '', 'i') });
  });

program
  .command('server')
  .description(
    'a server under 1 to 8 clients: requests a second, latencies, batches, cost beside the forward',
  )
  .addOption(new Option('--model <name>', 'which UNet').choices(['demo', ...models]).default('demo'))
  .option('--size <pixels>', 'latent pixels a side', Number, 16)
  .option('--images <count>', 'images of one request', Number, 2)
  .option('--clients <count,...>', 'how many clients at once', counts, [1, 2, 4, 8])
  .option('--seconds <count>', 'how long each round of each', Number, 5)
  .option('--rounds <count>', 'how many rounds', Number, 2)
  .option('--json <file>', 'also write the numbers there')
  .option('--adapter <name>', 'part of the name of the adapter')
  .action(benchServer);

program
  .command('transport')
  .description("what a step of the ComfyUI pack's client costs beyond its forward, on the loopback address")
  .option('--steps <count>', 'how many steps to time', Number, 500)
  .action((options: { readonly steps: number }) => benchTransport(options.steps));

program
  .command('report')
  .description('write the tables and plots of docs/PERFORMANCE.md from bench/results/*.json')
  .action(report);

await program.parseAsync();
