/** Numbers and tables as people read them in a terminal. */

const UNITS = ['B', 'KiB', 'MiB', 'GiB'] as const;

/** `12.3 GiB` */
export function sizeText(bytes: number): string {
  const power = bytes < 1 ? 0 : Math.min(3, Math.floor(Math.log2(bytes) / 10));
  const digits = power === 0 ? 0 : power === 3 ? 2 : 1;
  return `${(bytes / 1024 ** power).toFixed(digits)} ${UNITS[power]}`;
}

/** `850 ms`, `1.25 s` */
export function durationText(ms: number): string {
  return ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

/** `42 s`, `12 min`, `3 h 5 min` */
export function ageText(ms: number): string {
  const minutes = Math.floor(ms / 60_000);
  if (minutes === 0) return `${Math.floor(ms / 1000)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Two to three digits: `0.52`, `9.81`, `12.3`, `123`. */
export function rateText(perSecond: number): string {
  return perSecond === 0 ? '0' : perSecond.toFixed(perSecond < 10 ? 2 : perSecond < 100 ? 1 : 0);
}

export function countText(count: number): string {
  return count.toLocaleString('en');
}

/** Rows of cells in columns as wide as their widest cell, to the left unless told. */
export function columns(
  rows: readonly (readonly string[])[],
  aligns: readonly ('left' | 'right')[] = [],
): string {
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => row[i]!.length)));
  const lines = rows.map((row) =>
    row
      .map((cell, i) => (aligns[i] === 'right' ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!)))
      .join('  ')
      .trimEnd(),
  );
  return `${lines.join('\n')}\n`;
}
