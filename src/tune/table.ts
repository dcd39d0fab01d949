/** What was measured, as text for a terminal. */
import { columns } from '../format.ts';
import type { Choice } from '../gpu/kernel.ts';
import type { Forward, Row, Tuned } from './tune.ts';

/** `broadcast32`, and what else there is to it: `sgm16 splits=4`. */
const choiceText = ({ variant, ...rest }: Choice): string =>
  [variant, ...Object.entries(rest).map(([name, value]) => `${name}=${value}`)].join(' ');

const msText = (ms: number): string => ms.toFixed(ms < 10 ? 3 : 1);

const rowOf = ({ point, rules, better, use }: Row): readonly string[] => [
  point,
  use ? String(use.dispatches) : '',
  choiceText(rules.choice),
  msText(rules.ms),
  better ? choiceText(better.choice) : '',
  better ? msText(better.ms) : '',
  use ? `${(100 * use.share).toFixed(1)} %` : '',
];

const forwardOf = ({ label, rulesMs, tunedMs, ratio }: Forward): readonly string[] => [
  label,
  msText(rulesMs),
  msText(tunedMs),
  ratio.toFixed(3),
];

export function tableOf({ rows, forwards, choices }: Tuned): string {
  const gains = rows.filter(({ better }) => better).length;
  const kept = [...choices.values()].filter((choice) => choice).length;
  return [
    columns(
      [['choice', 'dispatches', 'rules', 'ms', 'tuned', 'ms', 'share'], ...rows.map(rowOf)],
      ['left', 'right', 'left', 'right', 'left', 'right', 'right'],
    ),
    columns(
      [['whole forwards', 'rules ms', 'tuned ms', 'ratio'], ...forwards.map(forwardOf)],
      ['left', 'right', 'right', 'right'],
    ),
    `${verdictOf(gains, kept)}\n`,
  ].join('\n');
}

function verdictOf(gains: number, kept: number): string {
  if (gains === 0) return 'The rules choose best everywhere.';
  if (kept === 0) return 'Whole forwards are no faster for it: the rules shall choose everywhere.';
  return `${kept} of the choices are better made than by the rules.`;
}
