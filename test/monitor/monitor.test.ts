/** The monitor page in a real browser: its numbers are those of /metrics, and it can be read in any theme and width. */
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Browser, chromium, type Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parseMetrics } from '../server/prometheus.ts';
import {
  comfyPlace,
  loraFile,
  openStage,
  type Place,
  request,
  type Stage,
  tensor,
} from '../server/setting.ts';

const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const FAST = 'fast.safetensors';
const LONG = `${'a-style-of-many-words-'.repeat(5)}.safetensors`;

let place: Place;
let browser: Browser;

beforeAll(async () => {
  place = comfyPlace(300);
  place.write(`loras/${LONG}`, loraFile(1));
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    // The user of a container is root, for whom Chromium's sandbox cannot work.
    args: process.getuid?.() === 0 ? ['--no-sandbox'] : [],
  });
});

afterAll(async () => {
  await browser?.close();
  place.remove();
});

interface View {
  readonly page: Page;
  /** What the browser complained about, and requests to anything but the server. */
  readonly complaints: string[];
}

async function open(
  stage: Stage,
  look: { readonly width: number; readonly colorScheme: 'light' | 'dark' },
  hash = '',
): Promise<View> {
  const { width, colorScheme } = look;
  const page = await browser.newPage({ viewport: { width, height: 844 }, colorScheme });
  const complaints: string[] = [];
  page.on('console', (message) => {
    if (['error', 'warning'].includes(message.type())) complaints.push(message.text());
  });
  page.on('pageerror', (error) => complaints.push(error.message));
  page.on('request', (sent) => {
    if (!sent.url().startsWith(stage.origin) && !sent.url().startsWith('data:')) complaints.push(sent.url());
  });
  await page.goto(`${stage.origin}/${hash}`);
  return { page, complaints };
}

interface Shown {
  readonly series: string;
  readonly value: number;
  readonly text: string;
}

const shownBy = (page: Page): Promise<readonly Shown[]> =>
  page.$$eval('[data-series]', (elements) =>
    elements.map((element) => {
      const { series = '', value = '' } = element.dataset;
      return { series, value: Number(value), text: element.textContent ?? '' };
    }),
  );

const state = (page: Page): Promise<string | null> => page.textContent('#state');
const metricsOf = async (stage: Stage): Promise<ReadonlyMap<string, number>> =>
  parseMetrics(await (await fetch(`${stage.origin}/metrics`)).text());

/** Requests of every kind, so that every part of the page has something to show. */
async function work(stage: Stage): Promise<void> {
  const client = await stage.connect();
  const uploaded = await client.loraPut([tensor('factor', [3])]);
  for (const lora of ['double.safetensors', LONG, uploaded])
    await client.forward({ ...request(FAST, 2, 0, 32), loras: [{ lora, strength: 1 }] });
  await Promise.all([1, 2, 3].map((seed) => client.forward(request('slow.safetensors', 1, seed))));
  await client.forward(request('none.safetensors')).catch(() => {});
  await client.forward(request('none.safetensors')).catch(() => {});
  await client.loraLoad('none.safetensors', FAST).catch(() => {});
}

const UNITS = ['', 'Ki', 'Mi', 'Gi'];

/** The bounds of what a text like `1,234` or `1.5 KiB` can stand for. */
function bounds(text: string): readonly [number, number] {
  const [, count = 'none', unit = ''] = /^([\d.,]+) ?([KMG]i)?B?$/.exec(text) ?? [];
  const scale = 1024 ** UNITS.indexOf(unit);
  const number = Number(count.replaceAll(',', '')) * scale;
  const slack = unit === '' ? 0 : 0.051 * scale;
  return [number - slack, number + slack];
}

describe.each([
  { width: 1280, colorScheme: 'light' },
  { width: 768, colorScheme: 'dark' },
  { width: 390, colorScheme: 'light' },
  { width: 390, colorScheme: 'dark' },
] as const)('the page, $width px wide, $colorScheme', (look) => {
  it('shows the numbers of /metrics, fits, can be read, and loads nothing from elsewhere', async () => {
    // A ping would change the bytes between page and metrics.
    const stage = await openStage(place, { pingMs: 600_000 });
    const { page, complaints } = await open(stage, look);
    await expect.poll(() => state(page)).toBe('● ready');
    await work(stage);
    const metrics = await metricsOf(stage);
    const bytes = metrics.get('unetd_sent_bytes_total');
    await expect
      .poll(
        async () => (await shownBy(page)).find(({ series }) => series === 'unetd_sent_bytes_total')?.value,
        {
          timeout: 10_000,
        },
      )
      .toBe(bytes);
    const shown = await shownBy(page);
    expect(shown.length).toBeGreaterThanOrEqual(27);
    for (const { series, value, text } of shown) {
      const code = /^errors\{result="(\w+)"\}$/.exec(series)?.[1];
      const expected =
        code === undefined
          ? metrics.get(series)
          : [...metrics]
              .filter(([name]) => name.startsWith('unetd_requests_total') && name.includes(`"${code}"`))
              .reduce((sum, [, count]) => sum + count, 0);
      expect(value, series).toBe(expected);
      const [least, most] = bounds(text);
      expect(value >= least && value <= most, `${series} reads ${text}, is ${value}`).toBe(true);
    }
    expect(shown.map(({ series }) => series)).toContain('errors{result="ERR_UNKNOWN_MODEL"}');
    const [needed, there] = await page.evaluate<readonly [number, number]>(
      '[document.documentElement.scrollWidth, document.documentElement.clientWidth]',
    );
    expect(needed).toBeLessThanOrEqual(there);
    await page.evaluate(AXE);
    const findings = await page.evaluate<readonly string[]>(
      'axe.run().then(({ violations }) => violations.map(({ id, nodes }) => JSON.stringify([id, nodes[0].html, nodes[0].failureSummary])))',
    );
    expect(findings).toEqual([]);
    expect(complaints).toEqual([]);
    await page.close();
    await stage.end();
  });
});

describe('the page', () => {
  const look = { width: 900, colorScheme: 'light' } as const;

  it('shows who does how much while it is done', async () => {
    const stage = await openStage(place, { pingMs: 600_000 });
    const { page } = await open(stage, look);
    const client = await stage.connect();
    const idle = await stage.connect();
    await idle.models();
    for (let i = 0; i < 12; i += 1) await client.forward(request('slow.safetensors', 2, i));
    const rows = async (): Promise<string[][]> =>
      page.$$eval('#peers tr', (found) =>
        found.map((row) => [...row.children].map((cell) => cell.textContent ?? '')),
      );
    const [busy, quiet] = await rows();
    // Two images in 300 ms: 6.7 a second at most, over a window of up to five seconds.
    expect(Number(busy![4])).toBeGreaterThan(2);
    expect(Number(busy![4])).toBeLessThan(8);
    expect(quiet!.slice(3, 5)).toEqual(['0', '0']);
    const label = await page.getAttribute('#charts svg', 'aria-label');
    expect(label).toMatch(/^Images per second over the last two minutes: now \d+\.\d+, at most \d/);
    await page.close();
    await stage.end();
  });

  it('says in words when the server is not ready, does not answer, or is back', async () => {
    const health = { alive: true, restarts: 0 };
    let stage = await openStage(place);
    const engine = Object.assign(stage.engine, health);
    const { port } = stage.server;
    const { page } = await open(stage, look);
    await expect.poll(() => state(page)).toBe('● ready');
    engine.alive = false;
    await expect.poll(() => state(page)).toMatch(/^▲ not ready/);
    await stage.end();
    await expect.poll(() => state(page)).toBe('▲ the server does not answer');
    stage = await openStage(place, { port });
    await expect.poll(() => state(page)).toBe('● ready');
    await page.close();
    await stage.end();
  });

  it('asks for the token where there is one, and takes it from its address', async () => {
    const stage = await openStage(place, { token: 'secret' });
    const { page } = await open(stage, look);
    await expect.poll(() => state(page)).toBe('▲ this server needs its token');
    await page.fill('#token', 'wrong');
    await page.click('#ask button');
    await expect.poll(() => state(page)).toBe('▲ the token is wrong');
    await page.fill('#token', 'secret');
    await page.click('#ask button');
    await expect.poll(() => state(page)).toBe('● ready');
    expect(await page.isVisible('#ask')).toBe(false);
    const direct = await open(stage, look, '#token=secret');
    await expect.poll(() => state(direct.page)).toBe('● ready');
    await sleep(1500);
    expect(direct.complaints).toEqual([]);
    for (const opened of [page, direct.page]) await opened.close();
    await stage.end();
  });
});
