/** The benchmark's command line: `npm run bench kernels -- [--filter RE] [--json FILE] ...`. Measures nothing itself. */
import { Command, Option } from 'commander';
import { benchKernels } from './kernels.ts';

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

await program.parseAsync();
