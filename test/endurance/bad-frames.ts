/**
 * Messages that a server should survive: random, mutated, and safetensors headers that lie. Each is a whole message, so it is answered
 * exactly once. Frames that break the WebSocket protocol are in `raw.ts`. No test itself.
 */
import { MODEL } from '../protocol/server.ts';
import { encode, frame, type Tensors } from '../protocol/tensors.ts';
import type { Known } from './catalogue.ts';
import { below, pick, type Random } from './scale.ts';

export type BadFrame = string | Buffer;
type Maker = (random: Random, id: string, known: Known) => BadFrame;

type Json = Record<string, unknown>;

const WORDS: readonly unknown[] = [
  ...[
    null,
    true,
    -1,
    0,
    1.5,
    1e300,
    Number.MAX_SAFE_INTEGER,
    '',
    'x',
    '..',
    '../../etc/passwd',
    '/etc/passwd',
  ],
  ...['sha256:', `sha256:${'0'.repeat(64)}`, 'ink.safetensors', MODEL, '\u0000', '\ud800', '💥'.repeat(50)],
  ...[[], {}, [[]], [{}], { __proto__: 1 }, Array(300).fill('x'), 'constructor', '__proto__', 'toString'],
];
const OPERATIONS: readonly Json[] = [
  { op: 'models.list' },
  { op: 'loras.list' },
  { op: 'stats' },
  { op: 'model.load', model: MODEL },
  { op: 'model.header', model: MODEL, values: ['out.2.bias'] },
  { op: 'lora.load', lora: 'ink.safetensors', model: MODEL },
  { op: 'model.has', digests: ['0'.repeat(64)] },
  { op: 'lora.has', digests: ['f'.repeat(64), 'x'] },
  { op: 'cancel', target: 'nobody' },
  { op: 'model.unload', model: 'none.safetensors' },
  { op: 'forward', model: MODEL },
  { op: 'no.such.operation' },
];
const FIELDS = [
  'model',
  'lora',
  'loras',
  'op',
  'dtype',
  'digests',
  'target',
  'values',
  'keep',
  'control',
  'x',
];

function bytes(random: Random, length: number): Buffer {
  return Buffer.from(Uint8Array.from({ length }, () => below(random, 256)));
}

function flip(random: Random, whole: Buffer, among: number): Buffer {
  const copy = Buffer.from(whole);
  for (let n = 1 + below(random, 4); n > 0; n -= 1) {
    const at = below(random, Math.min(among, copy.length));
    copy[at] = random() < 0.5 ? below(random, 256) : copy[at]! ^ (1 << below(random, 8));
  }
  return copy;
}

/** Cuts, repeats, inserts or drops a piece. */
function splice(random: Random, text: string): string {
  const at = below(random, text.length);
  const piece = text.slice(at, at + 1 + below(random, 20));
  const rest = text.slice(at + piece.length);
  return (
    text.slice(0, at) + pick(random, ['', piece + piece, '"', '{', ']', ',', '\\', `${piece}\u0000`]) + rest
  );
}

function forward(id: string, { fields, tensors }: Known, more: Json = {}): Buffer {
  return encode({ req: JSON.stringify({ id, op: 'forward', ...fields, ...more }) }, tensors);
}

/** Where the data of a valid frame begins. */
const dataAt = (whole: Buffer): number => 8 + Number(whole.readBigUInt64LE(0));

type Entries = Record<string, { dtype: unknown; shape: unknown; data_offsets: unknown }>;
type Lie = (entries: Entries, random: Random, dataBytes: number) => void;

/** What a header may say of its tensors without being right. */
const LIES: readonly Lie[] = [
  (all) => Object.assign(all.x!, { data_offsets: [-4, 4] }),
  (all) => Object.assign(all.x!, { data_offsets: [8, 0] }),
  (all) => Object.assign(all.x!, { data_offsets: all.context!.data_offsets }),
  (all) => Object.assign(all.x!, { data_offsets: [0, 1e15] }),
  (all) => Object.assign(all.x!, { data_offsets: [0.5, 4.5] }),
  (all) => Object.assign(all.x!, { data_offsets: [0] }),
  (all) => Object.assign(all.x!, { data_offsets: ['0', '768'] }),
  (all) => Object.assign(all.x!, { data_offsets: [0, 1e300] }),
  (all, _, total) => Object.assign(all.x!, { data_offsets: [total, total + 768] }),
  (all) => Object.assign(all.x!, { shape: [-1, 3, 8, 8] }),
  (all) => Object.assign(all.x!, { shape: [2 ** 31, 2 ** 31, 2 ** 31] }),
  (all) => Object.assign(all.x!, { shape: [1, 3, 8, 8.5] }),
  (all) => Object.assign(all.x!, { shape: Array(5000).fill(1) }),
  (all) => Object.assign(all.x!, { shape: [0, 3, 8, 8], data_offsets: [0, 0] }),
  (all) => Object.assign(all.x!, { shape: '1,3,8,8' }),
  (all) => Object.assign(all.x!, { shape: [[1], 3, 8, 8] }),
  (all) => Object.assign(all.x!, { dtype: 'F16' }),
  (all) => Object.assign(all.x!, { dtype: 'f32' }),
  (all) => Object.assign(all.x!, { dtype: 'I32' }),
  (all) => Object.assign(all.x!, { dtype: 7 }),
  (all) => Object.assign(all.x!, { more: true }),
  (all, random) => Object.assign(all, { [`y${below(random, 9)}`]: all.x }),
  (all) => Object.assign(all, { __metadata__: { req: 5 } }),
  (all) => Object.assign(all, { __metadata__: 'req' }),
  (all) => Object.assign(all, { __metadata__: undefined }),
  (all) => Object.assign(all, { ['n'.repeat(20_000)]: all.timesteps }),
  (all) => Object.assign(all, { '\u0000': all.timesteps }),
  (all) => Object.assign(all, { x: undefined }),
  (all) => Object.assign(all, { x: null }),
  (all) => Object.assign(all, { 'control.input.9999': all.x }),
];
/** What the text of a header may be. */
const TEXTS: readonly ((text: string) => string)[] = [
  (text) => text.replace('{', '{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'),
  (text) => text.replace('"x"', '"__proto__"'),
  (text) => text.replace('"x"', '"\\ud800"'),
  (text) => `${text}garbage`,
  (text) => `\ufeff${text}`,
  (text) => text.slice(0, -1),
  (text) => text.replace('[', '['.repeat(3000)),
  (text) => text.replace('{', '{"a":'.repeat(3000)),
  (text) => text.replace(/\d+/, 'NaN'),
  (text) => text.replace(/\d+/, '9'.repeat(400)),
  () => '',
  () => '[]',
  () => 'null',
];

function lyingLength(random: Random, whole: Buffer): Buffer {
  const copy = Buffer.from(whole);
  const true_ = copy.readBigUInt64LE(0);
  const size = BigInt(copy.length);
  const lies = [
    0n,
    1n,
    true_ - 1n,
    true_ + 1n,
    true_ + 8n,
    size - 8n,
    size,
    2n ** 32n,
    2n ** 53n,
    2n ** 64n - 1n,
  ];
  copy.writeBigUInt64LE(pick(random, lies), 0);
  return copy;
}

/** Kinds of bad message and how often each comes. */
const MAKERS: readonly (readonly [number, string, Maker])[] = [
  [8, 'random text', (random) => bytes(random, below(random, 200)).toString('latin1')],
  [12, 'mutated text', (random, id) => splice(random, JSON.stringify({ id, ...pick(random, OPERATIONS) }))],
  [
    20,
    'odd fields',
    (random, id) =>
      JSON.stringify({ id, ...pick(random, OPERATIONS), [pick(random, FIELDS)]: pick(random, WORDS) }),
  ],
  [2, 'odd id', (random) => JSON.stringify({ op: 'loras.list', id: pick(random, WORDS) })],
  [8, 'random bytes', (random) => bytes(random, below(random, 600))],
  [12, 'flipped header', (random, id, known) => flip(random, forward(id, known), dataAt(forward(id, known)))],
  [
    4,
    'spliced request',
    (random, id, { fields, tensors }) =>
      encode({ req: splice(random, JSON.stringify({ id, op: 'forward', ...fields })) }, tensors),
  ],
  [
    8,
    'odd forward',
    (random, id, known) => forward(id, known, { [pick(random, [...FIELDS, 'reuse'])]: pick(random, WORDS) }),
  ],
  [6, 'lying length', (random, id, known) => lyingLength(random, forward(id, known))],
  [20, 'lying header', lyingHeader],
  [
    6,
    'cut or longer',
    (random, id, known) => {
      const whole = forward(id, known);
      const extra = bytes(random, 1 + below(random, 16));
      return random() < 0.7 ? whole.subarray(0, below(random, whole.length)) : Buffer.concat([whole, extra]);
    },
  ],
  [2, 'bad upload', (random, id, known) => upload(random, id, known.tensors)],
];
const TOTAL = MAKERS.reduce((sum, [weight]) => sum + weight, 0);

function lyingHeader(random: Random, id: string, known: Known): Buffer {
  const whole = forward(id, known);
  const start = dataAt(whole);
  const data = whole.subarray(start);
  const text = whole.subarray(8, start).toString('utf8').trim();
  if (random() < 0.3) return frame(pick(random, TEXTS)(text), data);
  const entries = JSON.parse(text) as Entries;
  pick(random, LIES)(entries, random, data.length);
  return frame(JSON.stringify(entries), data);
}

function upload(random: Random, id: string, tensors: Tensors): Buffer {
  const digest = bytes(random, 32).toString('hex');
  const parts = pick(random, [1, 2, 65_536, 0, -1, '2']);
  const op = pick(random, ['lora.put', 'model.put']);
  return encode({ req: JSON.stringify({ id, op, digest, parts, part: pick(random, [0, 0, 1]) }) }, tensors);
}

/** One of them, with the name of its kind. `id` is the id it has, where it is not mutated too. */
export function badFrame(
  random: Random,
  id: string,
  known: Known,
): { readonly kind: string; readonly bytes: BadFrame } {
  let left = random() * TOTAL;
  for (const [weight, kind, make] of MAKERS) {
    left -= weight;
    if (left < 0) return { kind, bytes: make(random, id, known) };
  }
  throw new Error('the weights do not add up');
}

export { forward as goodFrame };
