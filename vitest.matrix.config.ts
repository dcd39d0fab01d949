import { defineConfig, type ViteUserConfig } from 'vitest/config';

/** Tests of their own process: compiling is most of their time, and takes one core. */
const project = (name: string, file: string, variants: string) => ({
  extends: true as const,
  test: { name, include: [file], env: { UNETD_VARIANTS: variants } },
});

/** What runs on matrix units, alone; scripts/test-matrix.sh runs it on a driver that has some. */
const config: ViteUserConfig = defineConfig({
  test: {
    projects: [
      project('gemm', 'test/kernels/numbers.test.ts', '^gemm sgm'),
      project('attention', 'test/kernels/numbers.test.ts', '^attention sgm'),
      project('forwards', 'test/unet/matrix.test.ts', ''),
    ],
    pool: 'forks',
    maxWorkers: 3,
    testTimeout: 600_000,
    hookTimeout: 120_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
