/** The command line as users run it, with the stand-in engine where one is needed. */
import { type ChildProcess, spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Client, floatsOf } from '../../src/client.ts';
import { comfyPlace, modelFile, type Place, request } from './setting.ts';
import { standInResult } from './stand-in-engine.ts';

const CLI = fileURLToPath(new URL('../../src/cli.ts', import.meta.url));
const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const MODULE = new URL('./stand-in-engine.ts', import.meta.url).href;

let place: Place;
let children: ChildProcess[];

beforeEach(() => {
  place = comfyPlace(200);
  children = [];
});

afterEach(() => {
  for (const child of children) child.kill('SIGKILL');
  place.remove();
});

interface Run {
  readonly child: ChildProcess;
  readonly output: { out: string; err: string };
  readonly exit: Promise<number | null>;
}

function run(...args: string[]): Run {
  const child = spawn(process.execPath, ['--import', 'tsx', CLI, ...args], { cwd: ROOT });
  children.push(child);
  const output = { out: '', err: '' };
  child.stdout.on('data', (chunk) => {
    output.out += chunk;
  });
  child.stderr.on('data', (chunk) => {
    output.err += chunk;
  });
  return { child, output, exit: new Promise((resolve) => child.on('close', resolve)) };
}

async function serving(...args: string[]): Promise<Run & { url: string }> {
  const started = run('serve', '--models', place.dir, '--port', '0', '--engine-module', MODULE, ...args);
  const url = await new Promise<string>((resolve, reject) => {
    started.child.stdout?.on('data', () => {
      const found = /^unetd listening on (ws:\/\/127\.0\.0\.1:\d+\/v1)$/m.exec(started.output.out);
      if (found !== null) resolve(found[1]!);
    });
    void started.exit.then((code) => reject(new Error(`ended with ${code}: ${started.output.err}`)));
  });
  return { ...started, url };
}

describe('unetd serve', () => {
  it('prints its address, serves, and drains on SIGTERM', async () => {
    const { url, child, exit, output } = await serving();
    const client = await Client.connect(url);
    await client.modelLoad('slow.safetensors');
    const open = client.forward(request('slow.safetensors'));
    await new Promise((resolve) => setTimeout(resolve, 50));
    child.kill('SIGTERM');
    expect((await open).timing.batch).toBe(1);
    expect(await exit).toBe(0);
    expect(output.out).toBe(`unetd listening on ${url}\n`);
    expect(JSON.parse(output.err.split('\n')[0]!)).toMatchObject({ device: 'stand-in' });
  });

  it('answers all it has taken when SIGTERM comes under load, and refuses the rest', async () => {
    const { url, child, exit, output } = await serving('--log-level', 'debug');
    const clients = await Promise.all(Array.from({ length: 6 }, () => Client.connect(url)));
    const outcomes: string[] = [];
    let done = 0;
    const one = async (client: Client, seed: number): Promise<void> => {
      const sent = { ...request('fast.safetensors', 1, seed), loras: [] };
      const outcome = await client.forward(sent).then(
        ({ out }) => {
          expect(floatsOf(out)).toEqual(floatsOf(standInResult(sent, new Map())));
          return 'ok';
        },
        ({ code }) => code,
      );
      outcomes.push(outcome);
      if (outcome === 'ok') done += 1;
    };
    const flood = clients.map(async (client, index) => {
      for (let seed = index; !outcomes.includes('ERR_DISCONNECTED'); seed += 1)
        await Promise.all([one(client, seed), one(client, seed + 100), one(client, seed + 200)]);
    });
    await expect.poll(() => done).toBeGreaterThan(200);
    child.kill('SIGTERM');
    await Promise.all(flood);
    expect(await exit).toBe(0);
    expect(new Set(outcomes).size).toBeLessThanOrEqual(3);
    for (const outcome of outcomes)
      expect(['ok', 'ERR_SHUTTING_DOWN', 'ERR_DISCONNECTED']).toContain(outcome);
    // Every result the server says it sent has arrived.
    const answers = output.err.split('\n').filter((line) => line.includes('"op":"forward"'));
    expect(answers.filter((line) => line.includes('"msg":"answered"'))).toHaveLength(done);
  });

  it('gives up open requests when the time to drain is over', async () => {
    place.write('checkpoints/slow.safetensors', modelFile({ delayMs: '60000' }));
    const { url, child, exit } = await serving('--drain-seconds', '1');
    const client = await Client.connect(url);
    await client.modelLoad('slow.safetensors');
    const open = client.forward(request('slow.safetensors'));
    open.catch(() => {});
    await expect.poll(async () => (await client.stats()).queue.running).toBe(1);
    const started = performance.now();
    child.kill('SIGTERM');
    await expect(open).rejects.toMatchObject({ code: 'ERR_DISCONNECTED' });
    expect(performance.now() - started).toBeGreaterThan(900);
    expect(performance.now() - started).toBeLessThan(4000);
    expect(await exit).toBe(0);
  });

  it('ends at once on a second signal', async () => {
    place.write('checkpoints/slow.safetensors', modelFile({ delayMs: '60000' }));
    const { url, child, exit } = await serving();
    const client = await Client.connect(url);
    await client.modelLoad('slow.safetensors');
    const open = client.forward(request('slow.safetensors'));
    open.catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, 50));
    child.kill('SIGINT');
    await new Promise((resolve) => setTimeout(resolve, 100));
    child.kill('SIGINT');
    expect(await exit).toBe(1);
    await expect(open).rejects.toMatchObject({ code: 'ERR_DISCONNECTED' });
  });

  it.each([
    [['serve'], /--models/],
    [
      ['serve', '--models', '/nowhere', '--engine-module', MODULE],
      /^unetd: --models \/nowhere: there is no such folder\.\n$/,
    ],
    [['serve', '--models', '.', '--port', '99999'], /Give a whole number from 0 to 65535/],
    [['serve', '--models', '.', '--memory-budget', 'much'], /Give a number of bytes like 12GiB/],
    [
      ['serve', '--models', '.', '--host', '0.0.0.0', '--engine-module', MODULE],
      /^unetd: Refusing to listen on 0\.0\.0\.0 without a token.*\n$/,
    ],
    [['serve', '--models', '.', '--engine-module', 'file:///nowhere.mjs'], /^unetd: .*nowhere\.mjs.*\n$/],
    [['models', '--models', '/nowhere'], /^unetd: --models \/nowhere: there is no such folder\.\n$/],
  ])('says in one sentence what is wrong with %j', async (args, message) => {
    const { exit, output } = run(...args);
    expect(await exit).toBe(1);
    expect(output.err).toMatch(message);
    expect(output.err).not.toContain('    at ');
  });
});

describe('unetd models', () => {
  it('lists names, sizes and what each file is', async () => {
    const { exit, output } = run('models', '--models', place.dir);
    expect(await exit).toBe(0);
    expect(output.out.split('\n')[0]).toMatch(/^fast\.safetensors\t79\.1 KiB\tThe file is no UNet/);
  });
});
