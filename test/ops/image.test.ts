/** The Dockerfile, repeated without Docker: what it copies is there, builds, and is enough to serve. Base image and packages are not tried. */
import { execFile } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { freePort, launchCommand, ROOT } from '../launch.ts';
import { build, contextPaths, type Image, isInContext, parseDockerfile } from './dockerfile.ts';
import { forwardOnce } from './reference.ts';

const TOKEN = 'a-token-for-this-test';
const run = promisify(execFile);
const instructions = parseDockerfile(readFileSync(join(ROOT, 'Dockerfile'), 'utf8'));
const place = mkdtempSync(join(tmpdir(), 'unetd-image-'));
let image: Image;

beforeAll(async () => {
  image = await build(instructions, ROOT, place);
}, 300_000);

afterAll(() => rmSync(place, { recursive: true, force: true }));

/** Runs what the image runs, with further variables as `docker run -e` would give them. */
const start = (env: Readonly<Record<string, string>>) =>
  launchCommand(image.command, { cwd: image.folder, env: { ...image.env, ...env } });

describe('the image', () => {
  it('takes only what is there and not left out, and all that the package has', () => {
    for (const path of contextPaths(instructions)) expect(isInContext(path, ROOT), path).toBe(true);
    const { files } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { files: string[] };
    expect(readdirSync(image.folder).sort()).toEqual(['node_modules', 'package.json', ...files].sort());
    expect(image.user).not.toBe('root');
    expect(existsSync(join(image.folder, 'node_modules/typescript'))).toBe(false);
  });

  it('does not start without a token, as it listens on all addresses', async () => {
    const models = { UNETD_MODELS: join(ROOT, 'demo/assets/models') };
    await expect(start(models)).rejects.toThrow(/ended with 1:.*unetd: .*token/s);
  });

  it('serves with variables alone, and its health check says so', async () => {
    const port = String(await freePort());
    const server = await start({
      UNETD_HOST: '127.0.0.1',
      UNETD_PORT: port,
      UNETD_TOKEN: TOKEN,
      UNETD_MODELS: join(ROOT, 'demo/assets/models'),
    });
    const [program = '', ...args] = image.healthcheck.map((each) => each.replace('8700', port));
    await run(program, args);
    await forwardOnce(server.url, TOKEN);
    server.child.kill('SIGTERM');
    expect(await server.exited).toBe(0);
    await expect(run(program, args)).rejects.toMatchObject({ code: 1 });
  });
});
