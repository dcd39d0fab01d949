/**
 * What each operation of the protocol does, given a decoded request. Answers through a return value; who asked, in which
 * order and how often is the business of `session.ts`.
 */
import { STORAGE_CHOICES } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';
import type { TensorView } from '../safetensors.ts';
import { choiceField, countField, onlyFields, refuse, textField, textsField } from './fields.ts';
import type { FileKind } from './folders.ts';
import { readForward } from './forward.ts';
import type { KeptTensors } from './kept.ts';
import type { Library } from './library.ts';
import type { Logger } from './log.ts';
import type { Metrics } from './metrics.ts';
import type { ModelEntry, Operation, ServerStats } from './protocol.ts';
import type { Residents } from './residents.ts';
import type { Scheduler } from './scheduler.ts';
import { checkDigest } from './uploads.ts';
import type { JsonObject } from './wire.ts';

/** The parts of the server that operations act on. */
export interface Services {
  readonly library: Library;
  readonly residents: Residents;
  readonly scheduler: Scheduler;
  readonly metrics: Metrics;
  readonly log: Logger;
  readonly stats: () => Promise<ServerStats>;
  readonly isDraining: () => boolean;
}

export interface Request {
  /** Name of the connection. */
  readonly owner: string;
  readonly header: JsonObject;
  /** Empty for a text frame. */
  readonly tensors: ReadonlyMap<string, TensorView>;
  readonly kept: KeptTensors;
  readonly signal: AbortSignal;
  readonly progress: (stage: string, done: number, total: number) => void;
  /** Cancels another open request of the same connection. */
  readonly cancel: (target: string) => boolean;
}

/** `result` makes a text frame, `tensors` a binary one with `fields` beside `id` and `ok`. */
export type Reply =
  | { readonly result: object }
  | { readonly fields: JsonObject; readonly tensors: readonly TensorView[] };

type Handler = (services: Services, request: Request) => Reply | Promise<Reply>;

const MAX_DIGESTS = 4096;
const MAX_PARTS = 65_536;

export const HANDLERS: Readonly<Record<Operation, Handler>> = {
  'models.list': async (services, { header }) => {
    onlyFields(header, 'models.list', []);
    return { result: { models: await listModels(services) } };
  },
  'model.load': async ({ residents }, { header, owner, progress, signal }) => {
    onlyFields(header, 'model.load', ['model', 'dtype']);
    const dtype = choiceField(header, 'dtype', STORAGE_CHOICES);
    const asker = { owner, progress, signal };
    return { result: await residents.loadModel(textField(header, 'model'), dtype, asker) };
  },
  'model.unload': async ({ residents }, { header, owner }) => {
    onlyFields(header, 'model.unload', ['model']);
    await residents.unloadModel(textField(header, 'model'), owner);
    return { result: {} };
  },
  'model.header': async ({ library }, { header }) => {
    onlyFields(header, 'model.header', ['model', 'values']);
    const values = header.values === undefined ? [] : textsField(header, 'values');
    const found = await library.header(textField(header, 'model'), values);
    return { fields: { header: found.header }, tensors: found.values };
  },
  'model.has': ({ library }, { header }) => has(library, 'model', header),
  'lora.has': ({ library }, { header }) => has(library, 'lora', header),
  'model.put': (services, request) => put(services, 'model', request),
  'lora.put': (services, request) => put(services, 'lora', request),
  'loras.list': async ({ library }, { header }) => {
    onlyFields(header, 'loras.list', []);
    const files = await library.list('lora');
    return { result: { loras: files.map(({ name, sizeBytes }) => ({ name, sizeBytes })) } };
  },
  'lora.load': async ({ residents }, { header }) => {
    onlyFields(header, 'lora.load', ['lora', 'model']);
    return { result: await residents.needAdapter(textField(header, 'lora'), textField(header, 'model')) };
  },
  forward: async ({ scheduler }, { header, tensors, kept, owner, signal }) => {
    const { out, timing } = await scheduler.forward(owner, readForward(header, tensors, kept), signal);
    return { fields: { timing }, tensors: [{ name: 'out', ...out }] };
  },
  cancel: (_services, { header, cancel }) => {
    onlyFields(header, 'cancel', ['target']);
    return { result: { cancelled: cancel(textField(header, 'target')) } };
  },
  stats: async ({ stats }, { header }) => {
    onlyFields(header, 'stats', []);
    return { result: await stats() };
  },
};

/** The models in the server's folders, as `models.list` and `GET /v1/models` give them. */
export async function listModels({ library, residents }: Services): Promise<readonly ModelEntry[]> {
  const files = await library.list('model');
  return files.map(({ name, sizeBytes, version }) => {
    const info = residents.model(name);
    const file = { name, sizeBytes, version };
    return info === undefined ? { ...file, loaded: false } : { ...file, loaded: true, config: info.config };
  });
}

function has(library: Library, kind: FileKind, header: JsonObject): Reply {
  onlyFields(header, `${kind}.has`, ['digests']);
  const digests = textsField(header, 'digests');
  if (digests.length > MAX_DIGESTS)
    refuse(`"digests" has ${digests.length} entries, at most ${MAX_DIGESTS} are taken`);
  return { result: { missing: library.missing(kind, digests) } };
}

async function put({ library, residents }: Services, kind: FileKind, request: Request): Promise<Reply> {
  const { header, tensors, owner } = request;
  onlyFields(header, `${kind}.put`, ['digest', 'part', 'parts']);
  const digest = checkDigest(textField(header, 'digest'));
  const parts = header.parts === undefined ? 1 : countField(header, 'parts', 1, MAX_PARTS);
  const part = header.part === undefined ? 0 : countField(header, 'part', 0, parts - 1);
  if (parts > 1 && header.part === undefined) {
    throw new UnetdError('ERR_BAD_REQUEST', `"parts" is ${parts}, so "part" must say which this is, from 0.`);
  }
  const isNeeded = (of: FileKind, name: string): boolean => residents.isNeeded(of, name);
  const complete = await library.uploads.put(
    { kind, owner, digest, part, parts, tensors: [...tensors.values()] },
    isNeeded,
  );
  return { result: { digest, complete } };
}
