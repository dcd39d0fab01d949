/** Rung `software`: every file in examples/ runs and says what its comments promise. */
import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';

const root = fileURLToPath(new URL('..', import.meta.url));

describe('the examples (software)', () => {
  test.each(readdirSync(`${root}examples`))('examples/%s runs', (file) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, ['--import', 'tsx', `examples/${file}`], {
      cwd: root,
      encoding: 'utf8',
    });
    expect(status, stderr).toBe(0);
    expect(stdout).toMatch(/one forward: \[1,3,32,32\] and \[1,3,32,32\]/);
  });
});
