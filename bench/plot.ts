/** Horizontal bars as SVG, readable on light and dark pages alike. Knows no benchmark. */

export interface Bar {
  readonly label: string;
  readonly value: number;
  /** Stands behind the bar. */
  readonly text: string;
}

const WIDTH = 760;
const LABELS = 300;
const TEXTS = 110;
const ROW = 22;
const TOP = 34;

const escaped = (text: string): string =>
  text.replace(/[&<>]/g, (sign) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;' })[sign]!);

/** The longest bar fills the width; `mark` is a value with a line of its own. */
export function barsOf(
  title: string,
  bars: readonly Bar[],
  mark?: { readonly value: number; readonly text: string },
): string {
  const most = Math.max(...bars.map(({ value }) => value), mark?.value ?? 0);
  const lengthOf = (value: number): number => ((WIDTH - LABELS - TEXTS) * value) / most;
  const height = TOP + bars.length * ROW + (mark ? ROW : 8);
  const rows = bars.map(({ label, value, text }, i) => {
    const y = TOP + i * ROW;
    return [
      `<text x="${LABELS - 8}" y="${y + 14}" text-anchor="end">${escaped(label)}</text>`,
      `<rect x="${LABELS}" y="${y + 3}" width="${lengthOf(value).toFixed(1)}" height="${ROW - 7}" rx="2"/>`,
      `<text x="${(LABELS + lengthOf(value) + 6).toFixed(1)}" y="${y + 14}">${escaped(text)}</text>`,
    ].join('');
  });
  const at = mark ? (LABELS + lengthOf(mark.value)).toFixed(1) : 0;
  const line = mark
    ? `<path d="M${at} ${TOP}V${height - ROW + 4}"/><text x="${at}" y="${height - 5}" text-anchor="middle">${escaped(mark.text)}</text>`
    : '';
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img">
<title>${escaped(title)}</title>
<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}rect{fill:#3b82c4}path{stroke:#8a6d1f;stroke-dasharray:4 3}@media(prefers-color-scheme:dark){text{fill:#d1d7e0}rect{fill:#5b9bd5}path{stroke:#d4b04c}}</style>
<text class="title" x="0" y="16">${escaped(title)}</text>
${line}
${rows.join('\n')}
</svg>
`;
}
