/** Where the settings of a server come from: flags over environment over file over defaults, and nothing misspelt. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { Command } from 'commander';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { applyFile, type Settings, serveOptions, strangeVariables } from '../../src/settings.ts';

let dir: string;
let file: string;
const variables: string[] = [];

beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'unetd-settings-'));
  file = join(dir, 'config.json');
});

afterEach(() => {
  for (const name of variables.splice(0)) delete process.env[name];
});

afterAll(() => rmSync(dir, { recursive: true, force: true }));

function withVariable(name: string, value: string): void {
  process.env[name] = value;
  variables.push(name);
}

/** The settings of `serve` with these flags and the text of a file. */
function settings(flags: readonly string[], text?: string): Settings {
  const command = new Command().exitOverride().configureOutput({ writeErr: () => {} });
  for (const option of serveOptions()) command.addOption(option);
  command.parse(flags, { from: 'user' });
  if (text !== undefined) {
    writeFileSync(file, text);
    applyFile(command, file);
  }
  return command.opts();
}

describe('settings', () => {
  it('come from flags, else the environment, else the file, else the defaults', () => {
    const text = JSON.stringify({ port: 1, maxBatch: 2, queueLimit: 3, memoryBudget: '1KiB' });
    withVariable('UNETD_PORT', '11');
    withVariable('UNETD_MAX_BATCH', '12');
    expect(settings(['--port', '21'], text)).toMatchObject({
      port: 21,
      maxBatch: 12,
      queueLimit: 3,
      memoryBudget: 1024,
      batchWaitMs: 0,
      host: '127.0.0.1',
    });
  });

  it('may be lists: repeated flags, a variable with separators, a list in the file; one source wins whole', () => {
    const text = JSON.stringify({ models: ['/file', '/other:file'], allowHost: ['file.example'] });
    expect(settings([], text).models).toEqual(['/file', '/other:file']);
    withVariable('UNETD_MODELS', `/env${delimiter}/more`);
    withVariable('UNETD_ALLOW_HOST', 'a.example,b.example');
    expect(settings([], text)).toMatchObject({
      models: ['/env', '/more'],
      allowHost: ['a.example', 'b.example'],
    });
    expect(settings(['--models', '/flag', '--models', '/b', '/c'], text).models).toEqual([
      '/flag',
      '/b',
      '/c',
    ]);
  });

  it('take every option from each of the three', () => {
    const values: Readonly<Record<string, string>> = {
      ...{ models: '/m', loras: '/l', host: '::1', port: '5', token: 'secret', dtype: 'f32' },
      ...{ memoryBudget: '2GB', maxBatch: '6', batchWaitMs: '7', queueLimit: '8', maxConnections: '9' },
      ...{ uploadQuota: '10MB', allowHost: 'h', allowOrigin: 'o', adapter: 'llvm', tuning: '/t.json' },
      drainSeconds: '11',
      ...{ hangSeconds: '12', logLevel: 'debug' },
    };
    const options = serveOptions();
    expect(options.map((option) => option.attributeName())).toEqual(Object.keys(values));
    const flags = options.flatMap((option) => [option.long!, values[option.attributeName()]!]);
    const byFlag = settings(flags);
    expect(byFlag).toMatchObject({ memoryBudget: 2e9, uploadQuota: 1e7, models: ['/m'], port: 5 });
    const inFile = options.map((option) => {
      const value = values[option.attributeName()];
      return [option.attributeName(), option.variadic ? [value] : value];
    });
    expect(settings([], JSON.stringify(Object.fromEntries(inFile)))).toEqual(byFlag);
    for (const option of options) withVariable(option.envVar!, values[option.attributeName()]!);
    expect(settings([])).toEqual(byFlag);
  });

  it.each([
    ['{"maxbatch":4}', /there is no setting "maxbatch"; there are models, .*maxBatch/],
    ['{"config":"other.json"}', /there is no setting "config"/],
    ['{"port":70000}', /"port" is 70000\. Give a whole number from 0 to 65535\.$/],
    ['{"port":1,"port":2}', /duplicate|twice|"port"/],
    ['{"dtype":"f64"}', /"dtype" is "f64"\. Allowed choices are auto, f32, f16, q8_0\.$/],
    ['{"models":"/srv"}', /"models" must be a list of strings\.$/],
    ['{"host":["a"]}', /"host" must be a string or a number\.$/],
    ['[]', /must hold one JSON object/],
    ['{"port":1', /expected/],
  ])('refuse the file %s in a sentence that names file and setting', (text, expected) => {
    expect(() => settings([], text)).toThrow(expected);
    expect(() => settings([], text)).toThrow(`--config ${file}: `);
  });

  it('refuse a value by the name of its variable', () => {
    withVariable('UNETD_PORT', 'tcp://10.0.0.1:8700');
    expect(() => settings([])).toThrow(/from env 'UNETD_PORT' is invalid/);
  });

  it('notice variables that are none', () => {
    const environment = { UNETD_PORT: '1', UNETD_MAXBATCH: '2', UNETD_URL: 'ws://x', PATH: '/' };
    expect(strangeVariables(environment)).toEqual(['UNETD_MAXBATCH']);
  });
});

describe('unetd serve', () => {
  const run = (args: readonly string[], env: Readonly<Record<string, string>> = {}) => {
    const { status, stderr } = spawnSync(
      process.execPath,
      ['--import', 'tsx', 'src/cli.ts', 'serve', ...args],
      {
        cwd: new URL('../..', import.meta.url),
        encoding: 'utf8',
        env: { ...process.env, ...env },
      },
    );
    return { status, stderr };
  };

  it('reads the file of --config and of UNETD_CONFIG', () => {
    writeFileSync(file, '{"models":["/nowhere"],"dtpye":"f32"}');
    const expected = { status: 1, stderr: expect.stringContaining('there is no setting "dtpye"') };
    expect(run(['--config', file])).toEqual(expected);
    expect(run([], { UNETD_CONFIG: file })).toEqual(expected);
    writeFileSync(file, '{"models":["/nowhere"]}');
    expect(run(['--config', file]).stderr).toBe('unetd: --models /nowhere: there is no such folder.\n');
    expect(run(['--config', '/none.json'])).toEqual({
      status: 1,
      stderr: 'unetd: --config /none.json: there is no such file.\n',
    });
  });

  it('warns of a variable that is no setting', () => {
    expect(run([], { UNETD_MAXBATCH: '4' }).stderr).toContain(
      '"name":"UNETD_MAXBATCH","msg":"no setting has this name: ignored"',
    );
  });
});
