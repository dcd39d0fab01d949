/** Rung `software`: the demo, cut short, as a newcomer runs it: right numbers, shared batches, a picture to look at. */
import { spawnSync } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { PNG } from 'pngjs';
import { beforeAll, describe, expect, test } from 'vitest';

const root = fileURLToPath(new URL('..', import.meta.url));
const sheet = `${root}demo/out/contact-sheet.png`;

describe('the demo (software)', () => {
  let output = '';
  beforeAll(() => {
    rmSync(sheet, { force: true });
    const brief = ['--steps', '3', '--pictures', '1', '--rounds', '0'];
    const { status, stdout, stderr } = spawnSync(
      process.execPath,
      ['--import', 'tsx', 'demo/demo.ts', ...brief],
      { cwd: root, encoding: 'utf8' },
    );
    expect(status, stderr).toBe(0);
    output = stdout;
  });

  test('it compares the server with PyTorch for every LoRA', () => {
    for (const stack of ['no LoRA', 'ink 1', 'neon 1', 'terracotta 1'])
      expect(output).toMatch(new RegExp(`${stack} +\\d\\.\\de-[45]`));
  });

  test('six workflows with different LoRAs share batches', () => {
    const shared = [...output.matchAll(/(\d+\.\d) of 6/g)].map(([, requests]) => Number(requests));
    expect(shared).toHaveLength(6);
    expect(Math.max(...shared)).toBeGreaterThan(1);
  });

  test('it writes a contact sheet that is no empty picture', () => {
    const { width, height, data } = PNG.sync.read(readFileSync(sheet));
    expect(width).toBeGreaterThan(200);
    expect(height).toBeGreaterThan(600);
    expect(new Set(new Uint32Array(data.buffer, data.byteOffset, data.length / 4)).size).toBeGreaterThan(
      1000,
    );
  });
});
