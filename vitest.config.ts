import { defineConfig, type ViteUserConfig } from 'vitest/config';

// One GPU process at a time: the software adapter already uses every core.
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    exclude: ['test/full/**'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 120_000,
    hookTimeout: 120_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
