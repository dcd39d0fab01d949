import { defineConfig, type ViteUserConfig } from 'vitest/config';

// One file at a time: each installs, builds and serves.
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/ops/**/*.test.ts'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 120_000,
    hookTimeout: 300_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
