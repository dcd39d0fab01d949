import { defineConfig, type ViteUserConfig } from 'vitest/config';

/** What runs on matrix units, alone; scripts/test-matrix.sh runs it on a driver that has some. */
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/kernels/numbers.test.ts', 'test/unet/matrix.test.ts'],
    env: { UNETD_VARIANTS: '^sgm' },
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 600_000,
    hookTimeout: 120_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
