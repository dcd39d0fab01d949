import { defineConfig, type ViteUserConfig } from 'vitest/config';

// One GPU process at a time: the software adapter already uses every core.
const config: ViteUserConfig = defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // These need more than a machine as it is: PyTorch's references, a browser, HAProxy, a registry. They have runs of their own.
    exclude: ['test/full/**', 'test/comfyui/**', 'test/monitor/**', 'test/scale/**', 'test/ops/**'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // What a test waits for comes late on a busy machine.
    expect: { poll: { timeout: 20_000 } },
    reporters: ['default', './test/tally.ts'],
  },
});

export default config;
