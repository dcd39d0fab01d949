/**
 * What was loaded into an engine process, to load it into the next one. Holds names and files, no weights; when a process is
 * replaced is decided in `process.ts`.
 */
import { UnetdError } from '../errors.ts';
import type { Child } from './child-process.ts';
import type { CallArguments, EngineMethod } from './messages.ts';
import type { FileSource, StorageDtype } from './types.ts';

interface Entry {
  readonly source: FileSource;
  readonly dtype: 'auto' | StorageDtype;
  readonly adapters: Map<string, FileSource>;
  /** Processes that ended while they loaded it again. */
  ends: number;
}

/** Processes that may end over loading one model again. */
const MAX_ENDS = 2;

export class Inventory {
  readonly #models = new Map<string, Entry>();

  get size(): number {
    return this.#models.size;
  }

  /** Another version or dtype of a model has none of the adapters of the one before. */
  add(source: FileSource, dtype: 'auto' | StorageDtype): void {
    const held = this.#models.get(source.name);
    const isSame = held?.source.version === source.version && (dtype === 'auto' || dtype === held.dtype);
    if (!isSame) this.#models.set(source.name, { source, dtype, adapters: new Map(), ends: 0 });
  }

  addAdapter(model: string, source: FileSource): void {
    this.#models.get(model)?.adapters.set(source.name, source);
  }

  remove(model: string): void {
    this.#models.delete(model);
  }

  /**
   * Loads everything into a new process, as far as that lives. What cannot be loaded any more is forgotten, and a model said to
   * `log`: the next forward that needs it meets ERR_MODEL_NOT_LOADED.
   */
  async loadInto(child: Child, limitMs: number, log: (line: string) => void): Promise<void> {
    for (const [name, held] of [...this.#models]) {
      const failure = await load(child, 'loadModel', [held.source, held.dtype], limitMs);
      held.ends = child.hasExited ? held.ends + 1 : 0;
      if (failure !== null && (held.ends === 0 || held.ends >= MAX_ENDS)) {
        this.#models.delete(name);
        log(`model ${name} could not be loaded again: ${failure}`);
      }
      if (child.hasExited) return;
      if (failure !== null) continue;
      for (const [lora, adapter] of [...held.adapters]) {
        // One that ends the process is not tried again either, until a request asks for it.
        if ((await load(child, 'loadAdapter', [adapter, name], limitMs)) !== null) held.adapters.delete(lora);
        if (child.hasExited) return;
      }
    }
  }
}

/** Null, or why it failed. */
async function load(
  child: Child,
  method: EngineMethod,
  args: CallArguments,
  limitMs: number,
): Promise<string | null> {
  try {
    await child.call(method, args, undefined, limitMs);
    return null;
  } catch (cause) {
    const { code, message } = UnetdError.from(cause);
    if (code === 'ERR_DEVICE_LOST') {
      child.kill(message);
      await child.exited;
    }
    return message;
  }
}
