/**
 * Whether a forward request fits a model: shapes, dtypes, strengths, ControlNet residuals. Pure: reads the config and the
 * request, touches no GPU, and does not look at the numbers inside tensors.
 */
import { type ErrorCode, UnetdError } from '../errors.ts';
import type { UNetConfig, UNetModule } from '../unet/config.ts';
import type { StepRequest, TensorData } from './types.ts';

/** [C, H, W] */
type ImageShape = readonly [number, number, number];
type Control = NonNullable<StepRequest['control']>;

/** The lists of control residuals, as the reference names them. */
export const CONTROL_LISTS = ['input', 'middle', 'output'] as const;

export const imagesOf = (request: StepRequest): number => request.x.shape[0] ?? 0;

/** Of all requests together. */
export const imagesIn = (requests: readonly StepRequest[]): number =>
  requests.reduce((sum, request) => sum + imagesOf(request), 0);

/** Shapes of the residuals each block takes, by number of the block. */
export interface ControlShapes {
  readonly input: readonly ImageShape[];
  readonly middle: readonly ImageShape[];
  readonly output: readonly ImageShape[];
}

/**
 * The request with its control lists brought to one entry per block, entry `length - 1 - b` belonging to block `b` as in
 * ComfyUI. ERR_BAD_SHAPE, ERR_BAD_DTYPE, ERR_BAD_STRENGTH, ERR_MISSING_TENSOR, ERR_UNEXPECTED_TENSOR.
 */
export function checkStep(config: UNetConfig, request: StepRequest, model: string): StepRequest {
  const { x, timesteps, context, y, control, loras } = request;
  for (const { lora, strength } of loras) checkStrength(lora, strength);
  checkFloat('x', x);
  const [images = 0, channels, height = 0, width = 0] = x.shape;
  if (x.shape.length !== 4 || x.shape.includes(0) || channels !== config.inChannels) {
    const cure =
      x.shape.length === 4 && channels === config.inChannels
        ? 'no size may be 0'
        : inputCure(config, channels);
    refuseShape('x', x, ['N', String(config.inChannels), 'H', 'W'], model, cure);
  }
  checkFloat('timesteps', timesteps, ['F32']);
  if (!sameShape(timesteps.shape, [images])) {
    refuseShape('timesteps', timesteps, [String(images)], model, 'send one timestep per image of x');
  }
  checkContext(config, context, images, model);
  checkY(config, y, images, model);
  if (control === undefined) return request;
  const checked = checkControl(config, control, [images, height, width], model);
  const { control: _, ...rest } = request;
  return checked === null ? rest : { ...rest, control: checked };
}

/** Requests with the same key can run as one forward, whatever their LoRA stacks, timesteps and dtypes. */
export function batchKey({ x, context, y, control }: StepRequest): string {
  const pattern = CONTROL_LISTS.map((list) =>
    (control?.[list] ?? []).map((entry) => (entry === null ? '0' : '1')).join(''),
  );
  return `${x.shape.slice(1)}|${context.shape.slice(1)}|${y === undefined ? '' : y.shape[1]}|${pattern.join('/')}`;
}

/** Requests that one forward cannot hold are a mistake of the caller: ERR_BAD_REQUEST. */
export function checkBatch(requests: readonly StepRequest[]): void {
  const [first] = requests;
  if (first === undefined)
    throw new UnetdError('ERR_BAD_REQUEST', 'The batch holds no request; send at least one.');
  const key = batchKey(first);
  const other = requests.findIndex((request) => batchKey(request) !== key);
  if (other < 0) return;
  throw new UnetdError(
    'ERR_BAD_REQUEST',
    `Requests 0 and ${other} of the batch cannot run as one forward: x, context, y or the control residuals differ in more than the number of images (${key} and ${batchKey(requests[other]!)}); send them apart.`,
    { request: other },
  );
}

/** What residual each block takes for a latent of this size: input blocks add it to their output, output blocks to the skip. */
export function controlShapes(config: UNetConfig, height: number, width: number): ControlShapes {
  const input: ImageShape[] = [];
  let size: readonly [number, number] = [height, width];
  let channels = config.inChannels;
  for (const block of config.input) {
    for (const module of block) {
      if (module.kind === 'down') size = [Math.ceil(size[0] / 2), Math.ceil(size[1] / 2)];
      channels = channelsAfter(module);
    }
    input.push([channels, ...size]);
  }
  for (const module of config.middle) channels = channelsAfter(module);
  return { input, middle: [[channels, ...size]], output: input.slice().reverse() };
}

function channelsAfter(module: UNetModule): number {
  return module.kind === 'conv' || module.kind === 'res' ? module.outChannels : module.channels;
}

function checkStrength(lora: string, strength: number): void {
  if (Number.isFinite(strength)) return;
  throw new UnetdError('ERR_BAD_STRENGTH', `LoRA "${lora}" has strength ${strength}; send a finite number.`, {
    lora,
  });
}

function checkContext(config: UNetConfig, context: TensorData, images: number, model: string): void {
  checkFloat('context', context);
  const [count, tokens, width] = context.shape;
  if (context.shape.length === 3 && count === images && tokens !== 0 && width === config.contextDim) return;
  const cure =
    width !== config.contextDim && context.shape.length === 3
      ? 'encode the prompt with the text encoder that belongs to this model'
      : tokens === 0
        ? 'send at least one token'
        : 'send one conditioning per image of x';
  refuseShape('context', context, [String(images), 'T', String(config.contextDim)], model, cure);
}

function checkY(config: UNetConfig, y: TensorData | undefined, images: number, model: string): void {
  const width = config.admChannels;
  if (width === null) {
    if (y === undefined) return;
    throw new UnetdError(
      'ERR_UNEXPECTED_TENSOR',
      `Model "${model}" has no label embedding, but the request holds "y" of shape [${y.shape.join(', ')}]; leave y out.`,
      { tensor: 'y' },
    );
  }
  if (y === undefined) {
    throw new UnetdError(
      'ERR_MISSING_TENSOR',
      `Model "${model}" needs the vector conditioning "y" of shape [${images}, ${width}], and the request has none; send it as F32 or F16.`,
      { tensor: 'y', expected: [images, width] },
    );
  }
  checkFloat('y', y);
  if (sameShape(y.shape, [images, width])) return;
  const cure =
    y.shape[1] === width
      ? 'send one vector per image of x'
      : 'make it with the conditioning that belongs to this model';
  refuseShape('y', y, [String(images), String(width)], model, cure);
}

function checkControl(
  config: UNetConfig,
  control: Control,
  [images, height, width]: readonly [number, number, number],
  model: string,
): Control | null {
  const shapes = controlShapes(config, height, width);
  const out: { [list in (typeof CONTROL_LISTS)[number]]?: readonly (TensorData | null)[] } = {};
  for (const list of CONTROL_LISTS) {
    const entries = control[list];
    if (entries === undefined || entries.every((entry) => entry === null)) continue;
    const blocks = shapes[list];
    out[list] = blocks.map((_, index) => entries[entries.length - blocks.length + index] ?? null);
    for (const [index, entry] of entries.entries()) {
      if (entry === null) continue;
      checkResidual(
        `control.${list}.${index}`,
        entry,
        [images, entries.length - 1 - index],
        blocks,
        list,
        model,
      );
    }
  }
  return Object.keys(out).length === 0 ? null : out;
}

function checkResidual(
  name: string,
  entry: TensorData,
  [images, block]: readonly [number, number],
  blocks: readonly ImageShape[],
  list: string,
  model: string,
): void {
  checkFloat(name, entry);
  const shape = blocks[block];
  if (shape === undefined) {
    throw new UnetdError(
      'ERR_UNEXPECTED_TENSOR',
      `Tensor "${name}" would belong to ${list} block ${block}, but model "${model}" has ${blocks.length}; the last entry of a list belongs to block 0, so check the list's length in "control" of the request.`,
      { tensor: name, block, blocks: blocks.length },
    );
  }
  const expected = [images, ...shape];
  if (sameShape(entry.shape, expected)) return;
  const cure = `it belongs to ${list} block ${block} (the last entry of a list belongs to block 0): use a ControlNet made for this architecture, and state the list's length in "control" where the list ends with None`;
  refuseShape(name, entry, expected.map(String), model, cure);
}

function inputCure(config: UNetConfig, channels: number | undefined): string {
  if (config.inChannels > 4 && channels === 4) {
    return 'this model takes concatenated input (an inpainting or instruction model): send x with c_concat behind its channels';
  }
  return 'use a latent made for this model';
}

function checkFloat(name: string, tensor: TensorData, allowed: readonly string[] = ['F32', 'F16']): void {
  const { dtype, shape, data } = tensor;
  if (!allowed.includes(dtype)) {
    throw new UnetdError(
      'ERR_BAD_DTYPE',
      `Tensor "${name}" has dtype ${dtype}, expected ${allowed.join(' or ')}; convert it before sending.`,
      { tensor: name, expected: allowed, actual: dtype },
    );
  }
  const bytes = shape.reduce((product, size) => product * size, dtype === 'F32' ? 4 : 2);
  if (data.byteLength === bytes) return;
  throw new UnetdError(
    'ERR_BAD_SHAPE',
    `Tensor "${name}" of shape [${shape.join(', ')}] and dtype ${dtype} needs ${bytes} bytes, got ${data.byteLength}; send all of it, or the shape it has.`,
    { tensor: name, expected: bytes, actual: data.byteLength },
  );
}

function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((size, index) => size === b[index]);
}

function refuseShape(
  tensor: string,
  { shape }: TensorData,
  expected: readonly string[],
  model: string,
  cure: string,
): never {
  const code: ErrorCode = 'ERR_BAD_SHAPE';
  const message = `Tensor "${tensor}" has shape [${shape.join(', ')}], model "${model}" takes [${expected.join(', ')}]: ${cure}.`;
  throw new UnetdError(code, message, { tensor, expected, actual: shape, model });
}
