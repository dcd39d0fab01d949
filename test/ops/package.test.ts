/** The package as a user gets it: packed, installed into an empty folder, run as the systemd unit runs it, and used as a library. */
import { execFile, execFileSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { DEFAULTS } from '../../src/server/serve.ts';
import { type Launched, launchCommand, ROOT } from '../launch.ts';
import { forwardOnce, MODEL } from './reference.ts';

const run = promisify(execFile);
const TOKEN = 'a-token-for-this-test';
const UNIT = readFileSync(join(ROOT, 'ops/unetd.service'), 'utf8');
const place = mkdtempSync(join(tmpdir(), 'unetd-package-'));
const app = join(place, 'app');
const binary = join(app, 'node_modules/.bin/unetd');
let packed: readonly string[];

beforeAll(async () => {
  const source = join(place, 'source');
  for (const name of [
    'package.json',
    'tsconfig.json',
    'tsconfig.build.json',
    'README.md',
    'LICENSE',
    'src',
    'assets',
    'shaders',
  ])
    cpSync(join(ROOT, name), join(source, name), { recursive: true });
  symlinkSync(join(ROOT, 'node_modules'), join(source, 'node_modules'));
  // Left over from an older build.
  mkdirSync(join(source, 'dist'));
  writeFileSync(join(source, 'dist/left-over.js'), '');
  const { stdout } = await run('npm', ['pack', '--json', '--pack-destination', place], { cwd: source });
  const [tarball] = JSON.parse(stdout.slice(stdout.indexOf('[\n'))) as {
    filename: string;
    files: { path: string }[];
  }[];
  packed = tarball!.files.map(({ path }) => path);
  mkdirSync(app);
  writeFileSync(join(app, 'package.json'), '{"private":true,"type":"module"}');
  const options = ['--no-audit', '--no-fund', '--prefer-offline', '--omit=dev'];
  await run('npm', ['install', ...options, join(place, tarball!.filename)], { cwd: app });
});

afterAll(() => rmSync(place, { recursive: true, force: true }));

/** The command of the unit, with the installed program and another file of settings. */
function unitCommand(settings: object): readonly string[] {
  const file = join(place, 'config.json');
  writeFileSync(file, JSON.stringify(settings));
  const [, command = ''] = /^ExecStart=(.*)$/m.exec(UNIT) ?? [];
  return command
    .split(' ')
    .map((each) =>
      each === '/usr/local/bin/unetd' ? binary : each === '/etc/unetd/config.json' ? file : each,
    );
}

describe('the package', () => {
  it('has what runs and what is read while it runs, and nothing else', () => {
    for (const path of [
      'dist/cli.js',
      'dist/engine/child.js',
      'dist/client.d.ts',
      'assets/monitor.html',
      'LICENSE',
    ])
      expect(packed).toContain(path);
    expect(packed.filter((path) => path.endsWith('.wgsl')).length).toBeGreaterThan(10);
    for (const path of packed)
      expect(path).toMatch(/^(dist|assets|shaders)\/|^(package\.json|README\.md|LICENSE)$/);
    expect(packed).not.toContain('dist/left-over.js');
  });

  it('says its version', async () => {
    const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string };
    expect((await run(binary, ['--version'])).stdout.trim()).toBe(version);
  });

  describe('served by the command of the systemd unit', () => {
    let server: Launched;

    beforeAll(async () => {
      const models = [join(ROOT, 'demo/assets/models')];
      const command = unitCommand({ models, loras: [join(ROOT, 'demo/assets/loras')], port: 0 });
      server = await launchCommand(command, { cwd: '/', env: { UNETD_TOKEN: TOKEN } });
    });

    it('answers a forward rightly, and has its page', async () => {
      await forwardOnce(server.url, TOKEN);
      const page = await fetch(server.url.replace('ws:', 'http:').replace('/v1', '/'));
      expect(await page.text()).toBe(readFileSync(join(ROOT, 'assets/monitor.html'), 'utf8'));
    });

    it('is used through the clients of the package', async () => {
      writeFileSync(
        join(app, 'probe.js'),
        `import { Client, tensorFrom } from 'unetd/client';
         import { FailoverClient } from 'unetd/failover';
         import { Engine } from 'unetd';
         const options = { token: ${JSON.stringify(TOKEN)} };
         const request = {
           model: ${JSON.stringify(MODEL)},
           x: tensorFrom(new Float32Array(768).fill(0.5), [1, 3, 16, 16]),
           timesteps: tensorFrom(Float32Array.of(500), [1]),
           context: tensorFrom(new Float32Array(256).fill(0.1), [1, 4, 64]),
         };
         const client = await Client.connect(process.argv[2], options);
         const several = new FailoverClient([process.argv[2]], options);
         const [one, other] = [await client.forward(request), await several.forward(request)];
         console.log(typeof Engine.create, one.out.shape, Buffer.compare(one.out.data, other.out.data));
         await Promise.all([client.close(), several.close()]);`,
      );
      const { stdout } = await run(process.execPath, ['probe.js', server.url], { cwd: app });
      expect(stdout.trim()).toBe('function [ 1, 3, 16, 16 ] 0');
    });

    it('ends with 0 on SIGTERM', async () => {
      server.child.kill('SIGTERM');
      expect(await server.exited).toBe(0);
    });
  });
});

const hasSystemd = (): boolean => {
  try {
    return execFileSync('systemd-analyze', ['--version']).length > 0;
  } catch {
    return false;
  }
};

describe('the systemd unit', () => {
  it('gives the server longer to end than it takes by itself', () => {
    expect(Number(/^TimeoutStopSec=(\d+)$/m.exec(UNIT)?.[1])).toBeGreaterThan(DEFAULTS.drainMs / 1000);
  });

  it.skipIf(!hasSystemd())(
    'has no mistake, and keeps to what it is allowed (needs systemd-analyze)',
    async () => {
      const file = join(place, 'unetd.service');
      writeFileSync(file, UNIT.replace('/usr/local/bin/unetd', binary));
      const { stdout, stderr } = await run('systemd-analyze', ['verify', file]);
      expect(stdout + stderr).toBe('');
      // Exposure from 0 to 100; it fails above. What is left open on purpose is at the end of the unit.
      await run('systemd-analyze', ['security', '--offline=true', '--threshold=40', file]);
    },
  );
});
