/** Rung `software`: `unetd tune` as users run it, and `unetd serve` with the file that it writes. */
import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { readTunings } from '../../src/engine/tuning.ts';
import { type Launched, launch, ROOT } from '../launch.ts';

const MODELS = join(ROOT, 'demo/assets/models');
const MODEL = join(MODELS, readdirSync(MODELS).find((name) => name.endsWith('.safetensors'))!);

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'unetd-command-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** What `unetd tune` with these options prints, and its exit code. */
function tune(...args: readonly string[]): Promise<{ code: number | null; out: string; err: string }> {
  const child = spawn(process.execPath, ['--import', 'tsx', 'src/cli.ts', 'tune', ...args], { cwd: ROOT });
  let [out, err] = ['', ''];
  child.stdout.on('data', (chunk) => {
    out += chunk;
  });
  child.stderr.on('data', (chunk) => {
    err += chunk;
  });
  return new Promise((resolve) => child.on('close', (code) => resolve({ code, out, err })));
}

/** The log lines of a server, as objects, once it listens; it is ended then. */
async function linesOf(tuning: string): Promise<readonly Readonly<Record<string, unknown>>[]> {
  const server: Launched = await launch('--models', folder, '--port', '0', '--tuning', tuning);
  server.child.kill('SIGTERM');
  expect(await server.exited).toBe(0);
  const lines = server.log().split('\n');
  return lines.filter((line) => line.startsWith('{')).map((line) => JSON.parse(line));
}

const WARN = 40;

describe('unetd tune', () => {
  test('measures a model, prints what it found and writes it where the server reads it', async () => {
    const path = join(folder, 'deep', 'tuning.json');
    const args = ['--model', MODEL, '--size', '8x8', '--batch', '1', '--rounds', '1', '--tuning', path];
    const { code, out, err } = await tune(...args);
    expect(err).toContain('round 1 of 1');
    expect(code).toBe(0);
    expect(out).toMatch(/^choice +dispatches +rules +ms +tuned +ms +share\n/);
    expect(out).toMatch(/\ngemm format=f16 a=conv3 images=1 rows=64 columns=\d+ depth=\d+ +\d+ +winograd /);
    expect(out).toMatch(
      /\nwhole forwards +rules ms +tuned ms +ratio\nall .*\n8x8, batch 1, no LoRA +[\d.]+ +[\d.]+ +[\d.]+\n/,
    );
    const [tuning] = readTunings(path)!;
    expect(out).toContain(`\nWritten to ${path}\n`);

    const lines = await linesOf(path);
    expect(lines.find(({ url }) => url)).toMatchObject({ tuned: tuning!.choices.size });
    expect(lines.filter(({ level }) => level === WARN)).toEqual([]);
  });

  test.each([
    ['broken', '[{]', /broken\.json is no file that "unetd tune" wrote.*kernels are chosen by rules/],
    ['not there', undefined, /cannot be read/],
  ])(
    'a file that is %s is named in a warning of the server, which serves without',
    async (_, text, warning) => {
      const path = join(folder, 'broken.json');
      rmSync(path, { force: true });
      if (text !== undefined) writeFileSync(path, text);
      const lines = await linesOf(path);
      expect(lines.filter(({ level }) => level === WARN).map(({ msg, path }) => `${path} ${msg}`)).toEqual([
        expect.stringMatching(warning),
      ]);
      expect(lines.find(({ url }) => url)).not.toHaveProperty('tuned');
    },
  );

  test.each([
    [['--size', '64'], /Give sizes in latent pixels, height and width, like 64x64,96x64/],
    [['--batch', '0'], /Give a whole number from 1 to 1024/],
    [['--like', 'flux'], /Allowed choices are sd15, sdxl/],
    [['--model', '/nowhere.safetensors'], /^unetd: .*nowhere\.safetensors.*cannot be opened.*$/m],
  ])('says in one sentence what is wrong with %j', async (args, message) => {
    const { code, err } = await tune(...args, '--tuning', join(folder, 'never.json'));
    expect(code).toBe(1);
    expect(err).toMatch(message);
    expect(err).not.toContain('    at ');
    expect(readdirSync(folder)).not.toContain('never.json');
  });
});
