/** Reads the Prometheus text format, strictly: a line that is none fails. No test itself. */

/** Series, as `name{label="value",…}` with its labels in the order they have in the text -> number. */
export function parseMetrics(text: string): ReadonlyMap<string, number> {
  const series = new Map<string, number>();
  for (const line of text.split('\n')) {
    if (line === '' || /^# (HELP|TYPE) /.test(line)) continue;
    const match = /^([a-zA-Z_:][\w:]*(?:\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\.)*",?)*\})?) (\S+)$/.exec(line);
    const value = Number(match?.[2] === '+Inf' ? Number.POSITIVE_INFINITY : match?.[2]);
    if (match === null || Number.isNaN(value)) throw new Error(`no Prometheus line: ${line}`);
    if (series.has(match[1]!)) throw new Error(`a series twice: ${match[1]}`);
    series.set(match[1]!, value);
  }
  return series;
}

/** Names of the metrics that the text declares -> their type. */
export function declaredTypes(text: string): ReadonlyMap<string, string> {
  return new Map([...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].map(([, name, type]) => [name!, type!]));
}

/** The labels of the only series of that name. */
export function labelsOf(text: string, name: string): Readonly<Record<string, string>> {
  const lines = [...parseMetrics(text).keys()].filter((series) => series.startsWith(`${name}{`));
  if (lines.length !== 1) throw new Error(`${lines.length} series of ${name}`);
  return Object.fromEntries(
    [...lines[0]!.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, value]) => [key!, value!]),
  );
}
