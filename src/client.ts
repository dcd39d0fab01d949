/**
 * A typed client of the wire protocol: one method per operation. It does not reconnect by itself: a forward is pure, so
 * whoever holds the endpoints may send it again elsewhere after ERR_DISCONNECTED.
 */
import { Connection, type ConnectOptions, type ProgressListener } from './connection.ts';
import { UnetdError } from './errors.ts';
import { fromF32, toF32 } from './half.ts';
import { digest as digestOf, type TensorView } from './safetensors.ts';
import type {
  ControlList,
  DtypeChoice,
  Hello,
  LoraEntry,
  LoraLoadResult,
  ModelEntry,
  ModelHeader,
  ModelLoadResult,
  Operation,
  ServerStats,
  Timing,
} from './server/protocol.ts';
import { CONTROL_LISTS } from './server/protocol.ts';
import { cutParts } from './server/put.ts';
import type { JsonObject } from './server/wire.ts';

export type { ConnectOptions, ProgressListener } from './connection.ts';
export { UnetdError } from './errors.ts';
export type { TensorView } from './safetensors.ts';
export type * from './server/protocol.ts';

/** A tensor of a request or result: dense, row-major, little endian. */
export interface ClientTensor {
  readonly dtype: 'F32' | 'F16';
  readonly shape: readonly number[];
  readonly data: Uint8Array;
}

export interface ForwardRequest {
  readonly model: string;
  readonly loras?: readonly { readonly lora: string; readonly strength: number }[];
  /** [N, C, H, W] */
  readonly x: ClientTensor;
  /** [N], F32 */
  readonly timesteps: ClientTensor;
  /** [N, T, D]; may be left out when `reuse.context` names a kept one. */
  readonly context?: ClientTensor;
  /** [N, D_adm] */
  readonly y?: ClientTensor;
  /** Lists as ComfyUI holds them: the last entry belongs to block 0. */
  readonly control?: Readonly<Partial<Record<ControlList, readonly (ClientTensor | null)[]>>>;
  readonly keep?: Readonly<Record<string, string>>;
  readonly reuse?: Readonly<Record<string, string>>;
}

export interface ForwardResult {
  /** [N, C_out, H, W] in the dtype of `x`. */
  readonly out: ClientTensor;
  readonly timing: Timing;
}

/** Float numbers as a tensor; an F32 tensor shares memory with `values`. */
export function tensorFrom(
  values: Float32Array,
  shape: readonly number[],
  dtype: 'F32' | 'F16' = 'F32',
): ClientTensor {
  const count = shape.reduce((product, size) => product * size, 1);
  if (count !== values.length) {
    throw new UnetdError(
      'ERR_BAD_SHAPE',
      `Shape [${shape}] has ${count} elements, the array ${values.length}.`,
    );
  }
  return { dtype, shape, data: fromF32(dtype, values) };
}

/** The numbers of a tensor, in memory of their own. */
export function floatsOf(tensor: { readonly dtype: string; readonly data: Uint8Array }): Float32Array {
  return toF32(tensor.dtype, tensor.data);
}

export class Client {
  /** What the server said on connecting: device, limits, version. */
  readonly hello: Hello;
  readonly #connection: Connection;

  private constructor(connection: Connection) {
    this.#connection = connection;
    this.hello = connection.hello;
  }

  /** Connects to `ws://HOST:PORT/v1` and waits for the server's hello. ERR_UNAUTHORIZED, ERR_DISCONNECTED. */
  static async connect(url: string, options: ConnectOptions = {}): Promise<Client> {
    return new Client(await Connection.open(url, options));
  }

  async models(): Promise<readonly ModelEntry[]> {
    return (await this.#ask('models.list')).models as readonly ModelEntry[];
  }

  /** Loads a model; a loaded one returns at once. */
  async modelLoad(
    model: string,
    options: { readonly dtype?: DtypeChoice; readonly onProgress?: ProgressListener } = {},
  ): Promise<ModelLoadResult> {
    const fields = options.dtype === undefined ? { model } : { model, dtype: options.dtype };
    return (await this.#ask('model.load', fields, options.onProgress)) as unknown as ModelLoadResult;
  }

  async modelUnload(model: string): Promise<void> {
    await this.#ask('model.unload', { model });
  }

  /** Names, dtypes and shapes of a model file, and the values of small tensors. Loads nothing. */
  async modelHeader(
    model: string,
    values: readonly string[] = [],
  ): Promise<{ readonly header: ModelHeader; readonly values: ReadonlyMap<string, TensorView> }> {
    const reply = await this.#connection.request('model.header', { model, values });
    return { header: reply.header.header as ModelHeader, values: reply.tensors ?? new Map() };
  }

  async loras(): Promise<readonly LoraEntry[]> {
    return (await this.#ask('loras.list')).loras as readonly LoraEntry[];
  }

  /** Loads a LoRA (a name or `sha256:HEX`) for a model. */
  async loraLoad(lora: string, model: string): Promise<LoraLoadResult> {
    return (await this.#ask('lora.load', { lora, model })) as unknown as LoraLoadResult;
  }

  /** Which of the digests the server lacks. */
  async modelHas(digests: readonly string[]): Promise<readonly string[]> {
    return (await this.#ask('model.has', { digests })).missing as readonly string[];
  }

  async loraHas(digests: readonly string[]): Promise<readonly string[]> {
    return (await this.#ask('lora.has', { digests })).missing as readonly string[];
  }

  /** Uploads the tensors of a model file unless the server has them. Resolves to the name to use: `sha256:HEX`. */
  modelPut(tensors: readonly TensorView[]): Promise<string> {
    return this.#put('model', tensors);
  }

  loraPut(tensors: readonly TensorView[]): Promise<string> {
    return this.#put('lora', tensors);
  }

  /** One evaluation of the UNet. Aborting `signal` cancels it on the server; the promise then rejects with ERR_CANCELLED. */
  async forward(
    request: ForwardRequest,
    options: { readonly signal?: AbortSignal } = {},
  ): Promise<ForwardResult> {
    const { fields, tensors } = forwardMessage(request);
    const { header, tensors: results } = await this.#connection.request('forward', fields, {
      tensors,
      ...options,
    });
    const out = results?.get('out');
    if (out === undefined)
      throw new UnetdError('ERR_BAD_FRAME', 'The reply to a forward holds no tensor "out".');
    return { out: out as ClientTensor & TensorView, timing: header.timing as Timing };
  }

  /** Cancels an open request of this connection by its id. */
  async cancel(target: string): Promise<boolean> {
    return (await this.#ask('cancel', { target })).cancelled as boolean;
  }

  async stats(): Promise<ServerStats> {
    return (await this.#ask('stats')) as unknown as ServerStats;
  }

  /** Closes the connection; open requests reject with ERR_DISCONNECTED. */
  close(): Promise<void> {
    return this.#connection.close();
  }

  async #put(kind: 'model' | 'lora', tensors: readonly TensorView[]): Promise<string> {
    const digest = digestOf(tensors);
    const missing = await (kind === 'model' ? this.modelHas([digest]) : this.loraHas([digest]));
    if (missing.length > 0) {
      const parts = cutParts(tensors, this.hello.limits.maxMessageBytes);
      for (const [part, piece] of parts.entries()) {
        const fields = { digest, part, parts: parts.length };
        await this.#connection.request(`${kind}.put`, fields, { tensors: piece });
      }
    }
    return `sha256:${digest}`;
  }

  async #ask(op: Operation, fields: JsonObject = {}, onProgress?: ProgressListener): Promise<JsonObject> {
    const options = onProgress === undefined ? {} : { onProgress };
    const { header } = await this.#connection.request(op, fields, options);
    return header.result as JsonObject;
  }
}

function forwardMessage(request: ForwardRequest): { fields: JsonObject; tensors: readonly TensorView[] } {
  const { x, timesteps, context, y, control, ...fields } = request;
  const tensors: TensorView[] = [];
  const lengths: Partial<Record<ControlList, number>> = {};
  for (const [name, tensor] of Object.entries({ x, timesteps, context, y })) {
    if (tensor !== undefined) tensors.push({ name, ...tensor });
  }
  for (const list of CONTROL_LISTS) {
    const entries = control?.[list];
    if (entries === undefined) continue;
    lengths[list] = entries.length;
    for (const [index, tensor] of entries.entries()) {
      if (tensor !== null) tensors.push({ name: `control.${list}.${index}`, ...tensor });
    }
  }
  return { fields: control === undefined ? fields : { ...fields, control: lengths }, tensors };
}
