/** `unetd top`: the numbers of the server, in a terminal, in a pipe and as JSON. */
import { spawn } from 'node:child_process';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Client } from '../../src/client.ts';
import type { ServerStats } from '../../src/server/protocol.ts';
import { look, screen, top } from '../../src/top.ts';
import { parseMetrics } from './prometheus.ts';
import { comfyPlace, openStage, type Place, request, type Stage } from './setting.ts';

let place: Place;
let stage: Stage;
let client: Client;

beforeEach(async () => {
  place = comfyPlace(50);
  stage = await openStage(place, { token: 'secret' });
  client = await stage.connect('secret');
});

afterEach(async () => {
  await stage.end();
  place.remove();
});

function unetdTop(args: readonly string[]): Promise<{ code: number | null; out: string; err: string }> {
  const { UNETD_TOKEN: _, ...env } = process.env;
  const child = spawn(process.execPath, ['--import', 'tsx', 'src/cli.ts', 'top', ...args], {
    cwd: new URL('../..', import.meta.url),
    env,
  });
  const output = { out: '', err: '' };
  child.stdout.on('data', (chunk) => {
    output.out += chunk;
  });
  child.stderr.on('data', (chunk) => {
    output.err += chunk;
  });
  return new Promise((resolve) => child.on('close', (code) => resolve({ code, ...output })));
}

async function work(): Promise<void> {
  for (const lora of ['double.safetensors', 'styles/minus.safetensors'])
    await client.forward({ ...request('fast.safetensors', 2), loras: [{ lora, strength: 1 }] });
  await client.forward(request('slow.safetensors'));
  await client.forward(request('none.safetensors')).catch(() => {});
}

describe('unetd top', () => {
  it('prints the statistics as JSON for scripts', async () => {
    await work();
    const { code, out } = await unetdTop([
      '--once',
      '--json',
      '--url',
      stage.server.url,
      '--token',
      'secret',
    ]);
    expect(code).toBe(0);
    const stats = JSON.parse(out) as ServerStats;
    expect(stats).toMatchObject({ forwards: { completed: 3, failed: 1, images: 5 }, connections: 1 });
    expect(out.trimEnd().split('\n')).toHaveLength(1);
  });

  it('shows one screen with the numbers of /metrics', async () => {
    await work();
    const { code, out, err } = await unetdTop(['--once', '--url', stage.origin, '--token', 'secret']);
    expect([code, err]).toEqual([0, '']);
    expect(out).not.toContain('\x1b');
    const headers = { authorization: 'Bearer secret' };
    const metrics = parseMetrics(await (await fetch(`${stage.origin}/metrics`, { headers })).text());
    for (const [pattern, series] of [
      [/waiting (\d+) of/, 'unetd_queue_depth'],
      [/connections (\d+)/, 'unetd_connections'],
      [/forwards (\d+) done/, 'unetd_requests_total{op="forward",result="ok"}'],
      [/LoRAs loaded (\d+)/, 'unetd_adapter_loads_total'],
      [/fast\.safetensors +f16 +1000 B +(\d+)/, 'unetd_images_total{model="fast.safetensors"}'],
      [/slow\.safetensors +f16 +1000 B +(\d+)/, 'unetd_images_total{model="slow.safetensors"}'],
      [/ERR_UNKNOWN_MODEL (\d+)/, 'unetd_requests_total{op="forward",result="ERR_UNKNOWN_MODEL"}'],
    ] as const)
      expect(Number(pattern.exec(out)?.[1]), String(pattern)).toBe(metrics.get(series));
    expect(out).toMatch(/slow\.safetensors.* 50 ms$/m);
    expect(out).toMatch(/^ {2}styles\/minus\.safetensors +4 B$/m);
  });

  it.each([
    [
      ['--once', '--url', 'ws://127.0.0.1:1/v1'],
      /^unetd: Cannot reach http:\/\/127\.0\.0\.1:1\/v1\/stats: .+\n$/,
    ],
    [['--once', '--url', 'here'], /^unetd: "here" is no address like ws:\/\/127\.0\.0\.1:8700\/v1\.\n$/],
    [['--interval', 'soon'], /Give a whole number from 1 to 3600/],
  ])('says in one sentence what is wrong with %j', async (args, message) => {
    const { code, err } = await unetdTop(args);
    expect(code).toBe(1);
    expect(err).toMatch(message);
  });

  it('says that the token is wrong', async () => {
    const options = { url: stage.server.url, token: 'wrong' };
    await expect(look(options)).rejects.toMatchObject({ code: 'ERR_UNAUTHORIZED' });
  });

  it('keeps showing a server that goes and comes back, in place on a terminal', async () => {
    const { port } = stage.server;
    const written: string[] = [];
    const terminal = { isTTY: true, columns: 80, rows: 20, write: (text: string) => written.push(text) };
    const ending = new AbortController();
    const options = { url: stage.server.url, token: 'secret', intervalMs: 50, once: false, json: false };
    const shown = top(options, terminal, ending.signal);
    await expect.poll(() => written.length).toBeGreaterThan(2);
    for (const text of written) {
      expect(text.startsWith('\x1b[Hunetd ')).toBe(true);
      expect(text.split('\n')[0]).toMatch(/ ready .*K$/);
      expect(text.split('\n').length).toBeLessThanOrEqual(20);
    }
    await stage.end();
    await expect.poll(() => written.at(-1)).toContain('Cannot reach');
    stage = await openStage(place, { token: 'secret', port });
    await expect.poll(() => written.at(-1)).toContain(' ready ');
    ending.abort();
    await shown;
  });
});

describe('a screen', () => {
  it('shows rates over its samples and fits the terminal', async () => {
    await work();
    const token = { url: stage.server.url, token: 'secret' };
    const before = await look(token);
    for (let i = 0; i < 4; i += 1) await client.forward(request('slow.safetensors', 2, i));
    const now = await look(token);
    const seconds = (now.uptimeMs - before.uptimeMs) / 1000;
    const lines = screen([before, now], 80);
    expect(lines[1]).toContain(`images/s ${(8 / seconds).toFixed(8 / seconds < 10 ? 2 : 1)}  `);
    expect(lines[1]).toContain(`GPU busy ${(200 / seconds / 10).toFixed(0)} %`);
    expect(lines.find((line) => line.startsWith('1 '))).toContain(
      (8 / seconds).toFixed(8 / seconds < 10 ? 2 : 1),
    );
    for (const line of screen([before, now], 60)) expect(line.length).toBeLessThanOrEqual(60);
  });

  it('passes no control characters from names to the terminal', async () => {
    const stats = await look({ url: stage.server.url, token: 'secret' });
    const model = {
      model: 'a\x1b]0;title\x07\n.safetensors',
      version: '',
      dtype: 'f16' as const,
      sizeBytes: 1,
    };
    const strange = { ...stats, engine: { ...stats.engine, models: [{ ...model, adapters: [] }] } };
    const text = screen([strange], 100).join('');
    expect(text).toContain('a?]0;title??.safetensors');
    expect(text).not.toMatch(/\p{Cc}/u);
  });
});
