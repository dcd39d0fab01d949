/**
 * Uploaded tensors, spooled part by part (`spool.ts`) into a private folder (`scratch.ts`) and addressed by digest. Removes
 * that folder on close; keeps within a quota by dropping the least recently used files that nobody needs.
 */
import { rmSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { UnetdError } from '../errors.ts';
import type { TensorView } from '../safetensors.ts';
import type { FileKind, FoundFile } from './folders.ts';
import { openScratch } from './scratch.ts';
import { Spool } from './spool.ts';

export const DIGEST_PREFIX = 'sha256:';
const DIGEST = /^[0-9a-f]{64}$/;
/** Files held, however small; unfinished uploads, each an open file, of one connection and of all. */
const MAX_FILES = 16_384;
const MAX_UNFINISHED = { owner: 16, all: 256 } as const;

export interface PutPart {
  readonly kind: FileKind;
  /** The connection: parts of different connections never mix. */
  readonly owner: string;
  readonly digest: string;
  readonly part: number;
  readonly parts: number;
  readonly tensors: readonly TensorView[];
}

interface Partial {
  readonly owner: string;
  readonly spool: Spool;
  readonly parts: number;
  /** The part that must come next. */
  next: number;
  /** Writes of one upload follow each other. */
  last: Promise<unknown>;
}

export class Uploads {
  readonly quotaBytes: number;
  readonly #folder: string;
  readonly #removeOnExit: () => void;
  /** `KIND/DIGEST` -> file, least recently used first. */
  readonly #files = new Map<string, FoundFile>();
  readonly #partials = new Map<string, Partial>();
  #nextFile = 1;

  private constructor(folder: string, quotaBytes: number) {
    this.#folder = folder;
    this.quotaBytes = quotaBytes;
    this.#removeOnExit = () => rmSync(folder, { recursive: true, force: true });
    process.on('exit', this.#removeOnExit);
  }

  static async open(quotaBytes: number): Promise<Uploads> {
    return new Uploads(await openScratch(), quotaBytes);
  }

  get usage(): { readonly files: number; readonly bytes: number; readonly quotaBytes: number } {
    return { files: this.#files.size, bytes: this.#bytes, quotaBytes: this.quotaBytes };
  }

  /** Of finished and unfinished files. */
  get #bytes(): number {
    let sum = 0;
    for (const { sizeBytes } of this.#files.values()) sum += sizeBytes;
    for (const { spool } of this.#partials.values()) sum += spool.sizeBytes;
    return sum;
  }

  has(kind: FileKind, digest: string): boolean {
    return this.#files.has(`${kind}/${digest}`);
  }

  /** The file behind `sha256:HEX`, marked as used, or null. ERR_BAD_REQUEST where HEX is no digest. */
  find(kind: FileKind, name: string): FoundFile | null {
    const digest = checkDigest(name.slice(DIGEST_PREFIX.length));
    const key = `${kind}/${digest}`;
    const file = this.#files.get(key);
    if (file === undefined) return null;
    this.#files.delete(key);
    this.#files.set(key, file);
    return file;
  }

  /** Takes one part; resolves to whether the file is complete. ERR_DIGEST_MISMATCH, ERR_TOO_LARGE, ERR_BAD_REQUEST. */
  async put(put: PutPart, isNeeded: (kind: FileKind, name: string) => boolean): Promise<boolean> {
    checkDigest(put.digest);
    const key = `${put.owner}/${put.kind}/${put.digest}`;
    if (this.has(put.kind, put.digest)) {
      // Another connection was first with it: what this one has sent so far is of no use.
      await this.#partials.get(key)?.last.catch(() => {});
      await this.#abandon(key);
      return true;
    }
    const partial = this.#partials.get(key) ?? this.#begin(key, put);
    const mine = partial.last.catch(() => {}).then(() => this.#append(key, partial, put, isNeeded));
    partial.last = mine;
    return mine;
  }

  /** Drops the unfinished uploads of a connection that ended. */
  async dropOwner(owner: string): Promise<void> {
    const keys = [...this.#partials].filter(([, partial]) => partial.owner === owner).map(([key]) => key);
    for (const key of keys) {
      await this.#partials.get(key)?.last.catch(() => {});
      await this.#abandon(key);
    }
  }

  async close(): Promise<void> {
    for (const key of [...this.#partials.keys()]) await this.#abandon(key);
    await rm(this.#folder, { recursive: true, force: true });
    process.off('exit', this.#removeOnExit);
  }

  #begin(key: string, put: PutPart): Partial {
    if (put.part !== 0) {
      throw new UnetdError(
        'ERR_BAD_REQUEST',
        `Part ${put.part} of ${put.digest} came, but no part 0 before it on this connection; begin with part 0.`,
      );
    }
    this.#refuseTooMany(put.owner);
    const path = join(this.#folder, `part-${this.#nextFile++}`);
    const fresh: Partial = {
      owner: put.owner,
      spool: new Spool(path, put.parts === 1 ? put.tensors : undefined),
      parts: put.parts,
      next: 0,
      last: Promise.resolve(),
    };
    this.#partials.set(key, fresh);
    return fresh;
  }

  #refuseTooMany(owner: string): void {
    const all = this.#partials.size;
    const own = [...this.#partials.values()].filter((each) => each.owner === owner).length;
    if (own < MAX_UNFINISHED.owner && all < MAX_UNFINISHED.all) return;
    throw new UnetdError(
      'ERR_BUSY',
      `There are ${own} unfinished uploads of this connection (at most ${MAX_UNFINISHED.owner}), ${all} of all (at most ${MAX_UNFINISHED.all}); finish one first.`,
    );
  }

  async #append(
    key: string,
    partial: Partial,
    put: PutPart,
    isNeeded: (kind: FileKind, name: string) => boolean,
  ): Promise<boolean> {
    if (this.has(put.kind, put.digest)) {
      await this.#abandon(key);
      return true;
    }
    if (this.#partials.get(key) !== partial) {
      throw new UnetdError(
        'ERR_BAD_REQUEST',
        `An earlier part of ${put.digest} failed; begin again with part 0.`,
      );
    }
    try {
      if (put.part < partial.next) return false;
      if (partial.parts !== put.parts || put.part !== partial.next) {
        throw new UnetdError(
          'ERR_BAD_REQUEST',
          `Expected part ${partial.next} of ${partial.parts} of ${put.digest}, got part ${put.part} of ${put.parts}; send parts in order.`,
        );
      }
      for (const tensor of put.tensors) {
        await this.#reserve(tensor.data.byteLength, isNeeded);
        await partial.spool.write(tensor);
      }
      partial.next += 1;
      if (partial.next < partial.parts) return false;
      await this.#finish(key, partial, put);
      return true;
    } catch (error) {
      await this.#abandon(key);
      throw error;
    }
  }

  /** Checks the digest and gives the file its name. */
  async #finish(key: string, { spool }: Partial, { kind, digest }: PutPart): Promise<void> {
    const actual = await spool.seal();
    if (actual !== digest) {
      throw new UnetdError(
        'ERR_DIGEST_MISMATCH',
        `The ${kind}'s ${spool.tensors} tensors have the digest ${actual}, announced was ${digest}; upload them again.`,
        { expected: digest, actual },
      );
    }
    this.#partials.delete(key);
    const path = join(this.#folder, `${kind}-${digest}.safetensors`);
    await spool.move(path);
    const { sizeBytes } = spool;
    const name = `${DIGEST_PREFIX}${digest}`;
    this.#files.set(`${kind}/${digest}`, { name, path, sizeBytes, version: digest.slice(0, 16) });
  }

  /** Makes room for more bytes. ERR_TOO_LARGE where what is needed fills the quota. */
  async #reserve(bytes: number, isNeeded: (kind: FileKind, name: string) => boolean): Promise<void> {
    let over = this.#bytes + bytes - this.quotaBytes;
    for (const [key, file] of this.#files) {
      if (over <= 0 && this.#files.size < MAX_FILES) return;
      if (isNeeded(key.startsWith('model/') ? 'model' : 'lora', file.name)) continue;
      over -= file.sizeBytes;
      this.#files.delete(key);
      await rm(file.path, { force: true });
    }
    if (this.#bytes + bytes <= this.quotaBytes) return;
    throw new UnetdError(
      'ERR_TOO_LARGE',
      `Uploads hold ${this.#bytes} bytes and may hold ${this.quotaBytes}: no room for ${bytes} more. Unload models, raise --upload-quota, or put the file into a folder of the server.`,
      { heldBytes: this.#bytes, quotaBytes: this.quotaBytes },
    );
  }

  async #abandon(key: string): Promise<void> {
    const partial = this.#partials.get(key);
    this.#partials.delete(key);
    await partial?.spool.discard();
  }
}

/** ERR_BAD_REQUEST where it is no digest. */
export function checkDigest(digest: string): string {
  if (DIGEST.test(digest)) return digest;
  throw new UnetdError(
    'ERR_BAD_REQUEST',
    `${JSON.stringify(digest.slice(0, 80))} is no digest: expected 64 lower-case hexadecimal digits (SHA-256).`,
  );
}
