/** docs/OPERATION.md lists what there is: every setting with its flag and default, every metric with its type and labels. */
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { serveOptions } from '../../src/settings.ts';
import { declaredTypes, parseMetrics } from './prometheus.ts';
import { comfyPlace, openStage, type Place, request, type Stage } from './setting.ts';

const TEXT = readFileSync(new URL('../../docs/OPERATION.md', import.meta.url), 'utf8');

/** The cells of the table whose header begins with this word. */
function tableOf(first: string): readonly (readonly string[])[] {
  const lines = TEXT.split('\n');
  const start = lines.findIndex((line) => line.startsWith(`| ${first} |`));
  const rows = lines.slice(start + 2);
  return rows
    .slice(
      0,
      rows.findIndex((line) => !line.startsWith('|')),
    )
    .map((line) =>
      line
        .slice(1, -1)
        .split('|')
        .map((cell) => cell.trim().replaceAll('`', '')),
    );
}

let place: Place;
let stage: Stage;
let metrics: string;

beforeAll(async () => {
  place = comfyPlace();
  stage = await openStage(place);
  const client = await stage.connect();
  await client.forward({
    ...request('fast.safetensors'),
    loras: [{ lora: 'double.safetensors', strength: 1 }],
  });
  metrics = await (await fetch(`${stage.origin}/metrics`)).text();
});

afterAll(async () => {
  await stage.end();
  place.remove();
});

describe('docs/OPERATION.md', () => {
  it('has every setting with its flag and its default, in the order of --help', () => {
    const listed = tableOf('key').map(([key, flag, preset]) => [key, flag, preset]);
    expect(listed).toEqual(
      serveOptions().map((option) => [
        option.attributeName(),
        option.long,
        option.defaultValue === undefined ? '' : String(option.defaultValue),
      ]),
    );
    for (const option of serveOptions())
      expect(option.envVar).toBe(`UNETD_${option.long!.slice(2).toUpperCase().replaceAll('-', '_')}`);
  });

  it('has every metric with its type and its labels, and no other', () => {
    const listed = new Map(tableOf('metric').map(([name, type]) => [name!, type!]));
    expect(new Map([...listed].sort())).toEqual(new Map([...declaredTypes(metrics)].sort()));
    const series = [...parseMetrics(metrics).keys()];
    for (const [name, type, labels] of tableOf('metric')) {
      const one = series.find(
        (each) => each.replace(/\{.*/, '') === (type === 'histogram' ? `${name}_count` : name),
      );
      const found = [...(one ?? '').matchAll(/(\w+)="/g)].map(([, label]) => label);
      expect(found.join(', '), name).toBe(labels);
    }
  });

  it('uses in its queries only metrics that there are', () => {
    const names = [...declaredTypes(metrics).keys()];
    for (const [name] of TEXT.matchAll(/\bunetd_[a-z_]+/g))
      expect(names, name).toContain(name.replace(/_(bucket|sum|count)$/, ''));
  });
});
