/**
 * Progress of several jobs at once: bars that redraw themselves in a terminal, plain lines at each quarter elsewhere.
 * Shows numbers it is given; measures nothing.
 */

export interface Progress {
  /** `note` is a short remark behind the bar. */
  update(job: number, done: number, note?: string): void;
  close(): void;
}

const BAR_WIDTH = 28;

/** Progress of `names.length` jobs of `total` steps each, written to `stream`. */
export function openProgress(
  names: readonly string[],
  total: number,
  stream: NodeJS.WriteStream = process.stdout,
): Progress {
  const width = Math.max(...names.map((name) => name.length));
  const state = names.map(() => ({ done: 0, note: '' }));
  const line = (job: number): string => {
    const { done, note } = state[job]!;
    const full = Math.round((BAR_WIDTH * done) / total);
    const bar = '█'.repeat(full) + '░'.repeat(BAR_WIDTH - full);
    return `  ${names[job]!.padEnd(width)} ${bar} ${String(done).padStart(3)}/${total} ${note}`;
  };
  const redraw = (): void => {
    for (const job of names.keys()) stream.write(`\x1b[2K${line(job)}\n`);
  };
  if (stream.isTTY) redraw();
  return {
    update(job, done, note = '') {
      const before = state[job]!.done;
      state[job] = { done, note };
      if (stream.isTTY) {
        stream.write(`\x1b[${names.length}A`);
        redraw();
      } else if (Math.floor((4 * before) / total) !== Math.floor((4 * done) / total)) {
        stream.write(`${line(job)}\n`);
      }
    },
    close() {
      if (stream.isTTY) stream.write('\n');
    },
  };
}
