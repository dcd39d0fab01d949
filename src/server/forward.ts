/**
 * From the tensors and fields of a `forward` message to a step for the engine, with kept tensors filled in, and from its
 * result to a reply. Checks what needs no model; `checkStep` does the rest.
 */
import type { LoraUse, StepRequest, TensorData } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';
import type { TensorView } from '../safetensors.ts';
import type { UNetConfig } from '../unet/config.ts';
import { describe, isObject, objectField, onlyFields, refuse, textField } from './fields.ts';
import type { KeptTensors } from './kept.ts';
import { CONTROL_LISTS, type ControlList } from './protocol.ts';
import type { JsonObject } from './wire.ts';

export interface ForwardMessage {
  readonly model: string;
  readonly step: StepRequest;
  /** Control lists whose length the request does not state. */
  readonly unstated: readonly ControlList[];
}

const FIELDS = ['model', 'loras', 'keep', 'reuse', 'control'];
const MAX_LORAS = 256;
const MAX_LIST = 1024;
const MAX_KEY = 256;
const CONTROL_NAME = /^control\.(input|middle|output)\.(0|[1-9]\d{0,3})$/;

/**
 * Reads a forward and keeps what it asks to keep. ERR_BAD_REQUEST, ERR_MISSING_TENSOR, ERR_UNEXPECTED_TENSOR,
 * ERR_NOT_KEPT, ERR_BAD_STRENGTH.
 */
export function readForward(
  header: JsonObject,
  sent: ReadonlyMap<string, TensorView>,
  kept: KeptTensors,
): ForwardMessage {
  onlyFields(header, 'forward', FIELDS);
  const model = textField(header, 'model');
  const loras = readLoras(header.loras);
  const tensors = withReused(sent, readKeys(header, 'reuse'), kept);
  keepTensors(tensors, readKeys(header, 'keep'), kept);
  for (const name of tensors.keys()) {
    if (['x', 'timesteps', 'context', 'y'].includes(name) || CONTROL_NAME.test(name)) continue;
    throw new UnetdError(
      'ERR_UNEXPECTED_TENSOR',
      `A forward has no tensor "${name.slice(0, 200)}"; it takes x, timesteps, context, y and control.input|middle|output.I.`,
      { tensor: name },
    );
  }
  const stated = objectField(header, 'control');
  const control = readControl(tensors, stated);
  const y = tensors.get('y');
  const step: StepRequest = {
    loras,
    x: need(tensors, 'x'),
    timesteps: need(tensors, 'timesteps'),
    context: need(tensors, 'context'),
    ...(y === undefined ? {} : { y: dense(y) }),
    ...(control === null ? {} : { control }),
  };
  return { model, step, unstated: CONTROL_LISTS.filter((list) => stated[list] === undefined) };
}

/** The step with control lists of unstated length taken as being as long as the model has blocks of that kind. */
export function completeControl({ step, unstated }: ForwardMessage, config: UNetConfig): StepRequest {
  const { control } = step;
  if (control === undefined || unstated.length === 0) return step;
  const blocks = { input: config.input.length, middle: 1, output: config.output.length };
  const lists: { [list in ControlList]?: readonly (TensorData | null)[] } = { ...control };
  for (const list of unstated) {
    const entries = control[list];
    if (entries === undefined) continue;
    const length = Math.max(entries.length, blocks[list]);
    lists[list] = Array.from({ length }, (_, index) => entries[index] ?? null);
  }
  return { ...step, control: lists };
}

function readLoras(value: unknown): readonly LoraUse[] {
  if (value === undefined) return [];
  if (!Array.isArray(value)) return refuse(`"loras" must be a list, got ${describe(value)}`);
  if (value.length > MAX_LORAS) refuse(`"loras" has ${value.length} entries, at most ${MAX_LORAS} are taken`);
  return value.map((entry: unknown, index): LoraUse => {
    if (!isObject(entry)) return refuse(`"loras[${index}]" must be an object, got ${describe(entry)}`);
    const extra = Object.keys(entry).find((name) => name !== 'lora' && name !== 'strength');
    if (extra !== undefined)
      refuse(`"loras[${index}]" takes lora and strength, got "${extra.slice(0, 100)}"`);
    const { lora, strength } = entry;
    if (typeof lora !== 'string' || lora === '') {
      return refuse(`"loras[${index}].lora" must be a name, got ${describe(lora)}`);
    }
    if (typeof strength === 'number' && Number.isFinite(strength)) return { lora, strength };
    throw new UnetdError(
      'ERR_BAD_STRENGTH',
      `LoRA "${lora}" has the strength ${describe(strength)}; send a finite number.`,
      { lora },
    );
  });
}

/** `keep` or `reuse`: tensor name -> key. */
function readKeys(header: JsonObject, field: 'keep' | 'reuse'): ReadonlyMap<string, string> {
  const keys = new Map<string, string>();
  for (const [name, key] of Object.entries(objectField(header, field))) {
    if (typeof key === 'string' && key !== '' && key.length <= MAX_KEY) keys.set(name, key);
    else
      refuse(
        `"${field}.${name.slice(0, 100)}" must be a key of 1 to ${MAX_KEY} characters, got ${describe(key)}`,
      );
  }
  return keys;
}

function withReused(
  sent: ReadonlyMap<string, TensorView>,
  reuse: ReadonlyMap<string, string>,
  kept: KeptTensors,
): ReadonlyMap<string, TensorView> {
  const tensors = new Map(sent);
  for (const [name, key] of reuse) {
    if (sent.has(name)) refuse(`Tensor "${name}" is both sent and reused; leave one out`);
    const tensor = kept.get(key);
    if (tensor === undefined) {
      throw new UnetdError(
        'ERR_NOT_KEPT',
        `Nothing is kept under "${key}" for tensor "${name}" on this connection (never kept, or evicted); send the tensor again.`,
        { tensor: name, key },
      );
    }
    tensors.set(name, { ...tensor, name });
  }
  return tensors;
}

function keepTensors(
  tensors: ReadonlyMap<string, TensorView>,
  keep: ReadonlyMap<string, string>,
  kept: KeptTensors,
): void {
  for (const [name, key] of keep) {
    const tensor = tensors.get(name);
    if (tensor === undefined)
      refuse(`"keep" names the tensor "${name.slice(0, 100)}", which the request does not hold`);
    else kept.set(key, tensor);
  }
}

/** ComfyUI's lists; one whose length is not stated ends with its highest index until `completeControl`. */
function readControl(
  tensors: ReadonlyMap<string, TensorView>,
  stated: JsonObject,
): NonNullable<StepRequest['control']> | null {
  for (const name of Object.keys(stated)) {
    if (!CONTROL_LISTS.some((list) => list === name)) {
      refuse(`"control" takes the list lengths input, middle and output, got "${name.slice(0, 100)}"`);
    }
  }
  const lists: { [list in ControlList]?: readonly (TensorData | null)[] } = {};
  for (const list of CONTROL_LISTS) {
    const entries: TensorData[] = [];
    for (const [name, tensor] of tensors) {
      if (name.startsWith(`control.${list}.`))
        entries[Number(name.slice(`control.${list}.`.length))] = dense(tensor);
    }
    const length = stated[list] ?? entries.length;
    if (
      typeof length !== 'number' ||
      !Number.isInteger(length) ||
      length < entries.length ||
      length > MAX_LIST
    ) {
      refuse(
        `"control.${list}" must be the length of that list, from ${entries.length} (its highest index plus one) to ${MAX_LIST}, got ${describe(length)}`,
      );
    } else if (entries.length > 0) lists[list] = Array.from({ length }, (_, index) => entries[index] ?? null);
  }
  return Object.keys(lists).length === 0 ? null : lists;
}

function need(tensors: ReadonlyMap<string, TensorView>, name: string): TensorData {
  const tensor = tensors.get(name);
  if (tensor !== undefined) return dense(tensor);
  throw new UnetdError(
    'ERR_MISSING_TENSOR',
    `The forward lacks the tensor "${name}" (it holds: ${[...tensors.keys()].join(', ').slice(0, 300) || 'none'}).`,
    { tensor: name },
  );
}

/** Dtypes other than F32 and F16 are refused by `checkStep`, which knows where each is allowed. */
function dense({ dtype, shape, data }: TensorView): TensorData {
  return { dtype: dtype as TensorData['dtype'], shape, data };
}
