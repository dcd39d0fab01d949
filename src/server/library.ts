/**
 * All files a client can name: those in the server's folders and those uploaded. Joins `folders.ts` and `uploads.ts`;
 * knows nothing of what is loaded.
 */
import type { FileSource } from '../engine/types.ts';
import { UnetdError } from '../errors.ts';
import { SafetensorsFile, type TensorView } from '../safetensors.ts';
import { type FileKind, type Folders, type FoundFile, findFile, listFiles, openFolders } from './folders.ts';
import type { ModelHeader } from './protocol.ts';
import { checkDigest, DIGEST_PREFIX, Uploads } from './uploads.ts';

/** Most bytes of one value that `model.header` returns. */
export const MAX_VALUE_BYTES = 65_536;
const MAX_VALUES = 1024;

export interface LibraryOptions {
  readonly models: readonly string[];
  readonly loras: readonly string[];
  readonly uploadQuotaBytes: number;
}

export class Library {
  readonly uploads: Uploads;
  readonly #folders: Folders;
  /** Searches of the folders that are under way: whoever asks meanwhile gets the same answer. */
  readonly #listing = new Map<FileKind, Promise<readonly FoundFile[]>>();

  private constructor(folders: Folders, uploads: Uploads) {
    this.#folders = folders;
    this.uploads = uploads;
  }

  /** ERR_BAD_REQUEST where a folder does not exist. */
  static async open(options: LibraryOptions): Promise<Library> {
    const folders = await openFolders(options.models, options.loras);
    return new Library(folders, await Uploads.open(options.uploadQuotaBytes));
  }

  /** The files in the folders; uploads are not listed. */
  list(kind: FileKind): Promise<readonly FoundFile[]> {
    const running = this.#listing.get(kind);
    if (running !== undefined) return running;
    const listing = listFiles(this.#folders, kind).finally(() => this.#listing.delete(kind));
    this.#listing.set(kind, listing);
    return listing;
  }

  /** The file of a name or `sha256:HEX`. ERR_UNKNOWN_MODEL, ERR_UNKNOWN_LORA, ERR_BAD_REQUEST. */
  async find(kind: FileKind, name: string): Promise<FileSource & FoundFile> {
    if (!name.startsWith(DIGEST_PREFIX)) return findFile(this.#folders, kind, name);
    const file = this.uploads.find(kind, name);
    if (file !== null) return file;
    throw new UnetdError(
      kind === 'model' ? 'ERR_UNKNOWN_MODEL' : 'ERR_UNKNOWN_LORA',
      `No ${kind} with the digest ${name} was uploaded, or it was dropped for newer ones; send it with "${kind}.put".`,
      { name },
    );
  }

  /** The digests of which no upload is held. */
  missing(kind: FileKind, digests: readonly string[]): readonly string[] {
    return digests.filter((digest) => !this.uploads.has(kind, checkDigest(digest)));
  }

  /** What a model file states about its tensors, and the values of small ones. ERR_TOO_LARGE, ERR_BAD_REQUEST, ERR_SAFETENSORS. */
  async header(
    model: string,
    values: readonly string[],
  ): Promise<{ readonly header: ModelHeader; readonly values: readonly TensorView[] }> {
    const { path } = await this.find('model', model);
    if (values.length > MAX_VALUES) {
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `"values" asks for ${values.length} tensors, at most ${MAX_VALUES}.`,
      );
    }
    const file = await SafetensorsFile.open(path);
    try {
      const wanted: TensorView[] = [];
      for (const name of new Set(values)) wanted.push(await smallTensor(file, model, name));
      const tensors = [...file.tensors].map(([name, { dtype, shape }]) => [name, { dtype, shape }] as const);
      const header = { tensors: Object.fromEntries(tensors), metadata: Object.fromEntries(file.metadata) };
      return { header, values: wanted };
    } finally {
      await file.close();
    }
  }

  async close(): Promise<void> {
    await this.uploads.close();
  }
}

async function smallTensor(file: SafetensorsFile, model: string, name: string): Promise<TensorView> {
  const entry = file.tensors.get(name);
  if (entry === undefined) {
    throw new UnetdError('ERR_BAD_REQUEST', `Model "${model}" has no tensor "${name.slice(0, 200)}".`, {
      tensor: name,
    });
  }
  if (entry.byteLength > MAX_VALUE_BYTES) {
    throw new UnetdError(
      'ERR_TOO_LARGE',
      `Tensor "${name}" of "${model}" takes ${entry.byteLength} bytes; "model.header" returns values of at most ${MAX_VALUE_BYTES}.`,
      { tensor: name, sizeBytes: entry.byteLength, limitBytes: MAX_VALUE_BYTES },
    );
  }
  return { name, dtype: entry.dtype, shape: entry.shape, data: await file.read(name) };
}
