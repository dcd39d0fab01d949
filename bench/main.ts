/** The benchmark's command line: `npm run bench kernels -- [--filter RE] [--json FILE] ...`. Measures nothing itself. */
import { Command, Option } from 'commander';
import { benchKernels } from './kernels.ts';
import { benchLora } from './lora.ts';
import { benchTransport } from './transport.ts';

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
  .command('transport')
  .description("what a step of the ComfyUI pack's client costs beyond its forward, on the loopback address")
  .option('--steps <count>', 'how many steps to time', Number, 500)
  .action((options: { readonly steps: number }) => benchTransport(options.steps));

await program.parseAsync();
