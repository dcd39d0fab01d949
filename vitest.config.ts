import { defineConfig, type ViteUserConfig } from 'vitest/config';
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/** These need more than a machine as it is: PyTorch's references, a browser, HAProxy, a registry. They have runs of their own. */
const ELSEWHERE = ['full', 'comfyui', 'monitor', 'scale', 'ops'].map((folder) => `test/${folder}/**`);

/** Most of their time a software adapter compiles shaders, on one core. */
const SHADERS = ['test/{engine,gpu,kernels,lora,tune,unet}/**/*.test.ts'];

/** What takes longest begins first; on a fresh clone Vitest has only the sizes of files to go by. */
class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const isLongest = ({ moduleId }: TestSpecification): boolean =>
      moduleId.endsWith('kernels/numbers.test.ts');
    const sorted = await super.sort(files);
    return [...sorted.filter(isLongest), ...sorted.filter((file) => !isLongest(file))];
  }
}

const config: ViteUserConfig = defineConfig({
  test: {
    pool: 'forks',
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // What a test waits for comes late on a busy machine.
    expect: { poll: { timeout: 20_000 } },
    reporters: ['default', './test/tally.ts'],
    sequence: { sequencer: LongestFirst },
    projects: [
      {
        extends: true,
        test: { name: 'shaders', include: SHADERS, maxWorkers: 2, sequence: { groupOrder: 0 } },
      },
      {
        extends: true,
        // One file at a time: a server under load uses every core.
        test: {
          name: 'service',
          include: ['test/**/*.test.ts'],
          exclude: [...ELSEWHERE, ...SHADERS],
          maxWorkers: 1,
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
});

export default config;
