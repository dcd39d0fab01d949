import { defineConfig, type ViteUserConfig } from 'vitest/config';

const PICTURES = 'test/comfyui/pictures.test.ts';

/** The pictures of one version of ComfyUI: much of their time one core compiles shaders or runs Python, so two versions run at once. */
const pictures = (version: string) => ({
  extends: true as const,
  test: {
    name: version,
    include: [PICTURES],
    env: { COMFYUI_VERSION: version },
    maxWorkers: 2,
    sequence: { groupOrder: 0 },
  },
});

const config: ViteUserConfig = defineConfig({
  test: {
    pool: 'forks',
    testTimeout: 120_000,
    hookTimeout: 180_000,
    reporters: ['default', './test/tally.ts'],
    projects: [
      pictures('0.3.75'),
      pictures('0.3.52'),
      {
        extends: true,
        // One file at a time: interrupts and lost servers are timed.
        test: {
          name: 'nodes',
          include: ['test/comfyui/**/*.test.ts'],
          exclude: [PICTURES],
          maxWorkers: 1,
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
});

export default config;
