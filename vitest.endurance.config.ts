import { defineConfig, type ViteUserConfig } from 'vitest/config';

// The long runs; their short versions are in the normal suite.
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/endurance/**/*.test.ts'],
    env: { ENDURANCE: 'long' },
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 3_600_000,
    hookTimeout: 120_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
