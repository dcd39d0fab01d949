/**
 * Which connections asked for a model in a storage of their choice. While they are open nobody else gets it in another one: the
 * results of one client do not change because another came. Knows names only, loads nothing.
 */
import type { StorageDtype } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';

export class StorageClaims {
  /** Model -> connection -> what it asked for: the same for all connections of a model. */
  readonly #claims = new Map<string, Map<string, StorageDtype>>();

  /** How the model has to be stored, if anybody said. */
  of(model: string): StorageDtype | undefined {
    return this.#claims.get(model)?.values().next().value;
  }

  /** ERR_MODEL_BUSY where another connection asked for the model in another storage. */
  check(model: string, owner: string, dtype: StorageDtype): void {
    const others = [...(this.#claims.get(model) ?? [])].filter(
      ([each, asked]) => each !== owner && asked !== dtype,
    );
    if (others.length === 0) return;
    const held = others[0]![1];
    const who = others.length === 1 ? 'another connection' : `${others.length} other connections`;
    throw new UnetdError(
      'ERR_MODEL_BUSY',
      `Model "${model}" cannot be stored as ${dtype}: ${who} asked for ${held}. Load it as ${held} or auto, or retry when they have closed.`,
      { model, dtype, held, connections: others.length },
    );
  }

  /** To be called when the model is loaded like that. */
  set(model: string, owner: string, dtype: StorageDtype): void {
    const owners = this.#claims.get(model) ?? new Map<string, StorageDtype>();
    this.#claims.set(model, owners.set(owner, dtype));
  }

  /** The connection no longer cares about this model. */
  drop(model: string, owner: string): void {
    const owners = this.#claims.get(model);
    owners?.delete(owner);
    if (owners?.size === 0) this.#claims.delete(model);
  }

  /** The connection has ended. */
  dropOwner(owner: string): void {
    for (const model of [...this.#claims.keys()]) this.drop(model, owner);
  }
}
