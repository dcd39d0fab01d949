/** The models that an engine holds, and who of them, or what of theirs, leaves first when memory is short. */
import { UnetdError } from '../errors.ts';
import type { LoadedModel } from './model.ts';
import type { ModelInfo } from './types.ts';

export interface Held {
  readonly info: ModelInfo;
  readonly model: LoadedModel;
  lastUse: number;
  /** Forwards and adapter loads that wait or run. */
  uses: number;
}

export class HeldModels {
  readonly #held = new Map<string, Held>();
  #clock = 0;

  /** ERR_MODEL_NOT_LOADED. */
  get(model: string): Held {
    const held = this.#held.get(model);
    if (!held)
      throw new UnetdError('ERR_MODEL_NOT_LOADED', `Model "${model}" is not loaded; load it first`, {
        model,
      });
    return held;
  }

  find(model: string): Held | undefined {
    return this.#held.get(model);
  }

  all(): readonly Held[] {
    return [...this.#held.values()];
  }

  add(info: ModelInfo, model: LoadedModel): void {
    this.#held.set(info.model, { info, model, lastUse: ++this.#clock, uses: 0 });
  }

  remove(model: string): void {
    this.#held.delete(model);
  }

  touch(held: Held): void {
    held.lastUse = ++this.#clock;
  }

  /** GPU bytes of the models that no request uses, and of what else no forward binds. */
  get idleBytes(): number {
    return this.all().reduce(
      (sum, { info, model, uses }) =>
        sum + (uses === 0 ? info.sizeBytes + model.adapterBytes : model.patched.idleBytes),
      0,
    );
  }

  get weightBytes(): number {
    return this.all().reduce((sum, { info }) => sum + info.sizeBytes, 0);
  }

  get adapterBytes(): number {
    return this.all().reduce((sum, { model }) => sum + model.adapterBytes, 0);
  }

  /** Lets a copy of a weight go that no forward binds, of the model that was used least recently; false where there is none. */
  evictPatched(): boolean {
    return this.#byUse().some(({ model }) => model.patched.evictOne());
  }

  /** Lets the model go that was used least recently and has no request; false where there is none. */
  evictModel(): boolean {
    const oldest = this.#byUse().find(({ uses }) => uses === 0);
    if (!oldest) return false;
    this.remove(oldest.info.model);
    oldest.model.close();
    return true;
  }

  close(): void {
    for (const { model } of this.all()) model.close();
    this.#held.clear();
  }

  #byUse(): readonly Held[] {
    return [...this.all()].sort((a, b) => a.lastUse - b.lastUse);
  }
}
