/** The server's log: JSON lines on standard error, or short text where that is a terminal. Standard output stays free. */
import { type Logger, pino } from 'pino';

export type { Logger } from 'pino';

export const LOG_LEVELS = ['silent', 'error', 'warn', 'info', 'debug'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

export function createLog(level: LogLevel): Logger {
  const options = { level, base: null };
  return process.stderr.isTTY
    ? pino(options, { write: (line) => process.stderr.write(asText(line)) })
    : pino(options, pino.destination({ dest: 2, sync: true }));
}

function asText(line: string): string {
  const { time, level, msg, ...rest } = JSON.parse(line) as Record<string, unknown>;
  const name = pino.levels.labels[Number(level)] ?? '';
  const facts = Object.entries(rest).map(([key, value]) => ` ${key}=${JSON.stringify(value)}`);
  return `${new Date(Number(time)).toISOString().slice(11, 19)} ${name.padEnd(5)} ${msg}${facts.join('')}\n`;
}
