import { defineConfig, type ViteUserConfig } from 'vitest/config';

// One file at a time: several servers already use every core.
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/scale/**/*.test.ts'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 180_000,
    hookTimeout: 120_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
