import { defineConfig, type ViteUserConfig } from 'vitest/config';

// One file at a time: ComfyUI and the software adapter each use every core.
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/comfyui/**/*.test.ts'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 120_000,
    hookTimeout: 180_000,
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
