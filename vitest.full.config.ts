import { defineConfig, type ViteUserConfig } from 'vitest/config';

// One GPU process at a time: the software adapter already uses every core.
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/full/**/*.test.ts'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 1_800_000,
    hookTimeout: 1_800_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
