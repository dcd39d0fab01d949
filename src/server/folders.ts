/**
 * Which safetensors files lie in the given folders, and the file behind a name. Names are relative, with forward slashes;
 * nothing outside the folders is reachable, not through links either. Reads no file contents.
 */
import { readdir, realpath, stat } from 'node:fs/promises';
import { isAbsolute, join, relative, sep } from 'node:path';
import { UnetdError } from '../errors.ts';

export const EXTENSION = '.safetensors';
const MAX_DEPTH = 8;
const MAX_FILES = 20_000;

export type FileKind = 'model' | 'lora';

/** One folder whose files are named relative to it. */
export interface Root {
  readonly path: string;
  /** Subfolders of this name, directly below, hold the other kind. */
  readonly without?: string;
}

export interface Folders {
  readonly models: readonly Root[];
  readonly loras: readonly Root[];
  /** Real paths that links may lead into. */
  readonly allowed: readonly string[];
}

export interface FoundFile {
  readonly name: string;
  readonly path: string;
  readonly sizeBytes: number;
  /** Opaque; changes when the file does. */
  readonly version: string;
}

const MODEL_SUBFOLDERS = ['checkpoints', 'diffusion_models', 'unet'];
const LORA_SUBFOLDER = 'loras';

/**
 * A models folder with subfolders as ComfyUI names them is read like that; any other is a plain folder of models, except
 * for its `loras` subfolder. ERR_BAD_REQUEST where a folder does not exist.
 */
export async function openFolders(
  modelDirs: readonly string[],
  loraDirs: readonly string[],
): Promise<Folders> {
  const models: Root[] = [];
  const loras: Root[] = [];
  const allowed: string[] = [];
  for (const dir of modelDirs) {
    const real = await realFolder(dir, '--models');
    allowed.push(real);
    const names = (await readdir(real, { withFileTypes: true }))
      .filter((entry) => !entry.isFile())
      .map(({ name }) => name);
    const known = MODEL_SUBFOLDERS.filter((name) => names.includes(name));
    if (known.length > 0) models.push(...known.map((name) => ({ path: join(real, name) })));
    else models.push({ path: real, without: LORA_SUBFOLDER });
    if (names.includes(LORA_SUBFOLDER)) loras.push({ path: join(real, LORA_SUBFOLDER) });
  }
  for (const dir of loraDirs) {
    const real = await realFolder(dir, '--loras');
    allowed.push(real);
    loras.push({ path: real });
  }
  // A subfolder may itself be a link: the user who made it part of the folder meant its target to be used.
  for (const root of [...models, ...loras]) allowed.push(await realpath(root.path).catch(() => root.path));
  return { models, loras, allowed: [...new Set(allowed)] };
}

async function realFolder(dir: string, option: string): Promise<string> {
  try {
    const real = await realpath(dir);
    if ((await stat(real)).isDirectory()) return real;
  } catch {
    // Falls through to the message.
  }
  throw new UnetdError('ERR_BAD_REQUEST', `${option} ${dir}: there is no such folder.`);
}

/** All files of a kind, sorted by name; where two roots hold the same name, the first root's counts. */
export async function listFiles(folders: Folders, kind: FileKind): Promise<readonly FoundFile[]> {
  const files = new Map<string, FoundFile>();
  for (const root of rootsOf(folders, kind)) {
    await walk(root, root.path, 0, folders, files);
  }
  return [...files.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** The file of that name. ERR_UNKNOWN_MODEL or ERR_UNKNOWN_LORA, ERR_BAD_REQUEST for what is no name. */
export async function findFile(folders: Folders, kind: FileKind, name: string): Promise<FoundFile> {
  const fault = nameFault(name);
  if (fault !== null) {
    throw new UnetdError(
      'ERR_BAD_REQUEST',
      `${JSON.stringify(name.slice(0, 200))} is no ${kind} name: ${fault}.`,
    );
  }
  let outside = false;
  for (const root of rootsOf(folders, kind)) {
    const found = await inspect(root, join(root.path, ...name.split('/')), folders);
    if (found === 'outside') outside = true;
    else if (found !== null) return found;
  }
  const code = kind === 'model' ? 'ERR_UNKNOWN_MODEL' : 'ERR_UNKNOWN_LORA';
  const reason = outside
    ? `is a link that leaves the server's folders; start the server with --${kind}s for the folder it leads to`
    : `is not in the server's ${kind} folders; "${kind}s.list" gives the names it has, "${kind}.put" uploads one`;
  throw new UnetdError(code, `${kind === 'model' ? 'Model' : 'LoRA'} "${name}" ${reason}.`, { name });
}

function rootsOf(folders: Folders, kind: FileKind): readonly Root[] {
  return kind === 'model' ? folders.models : folders.loras;
}

function nameFault(name: string): string | null {
  if (!name.endsWith(EXTENSION)) return `it must end with ${EXTENSION}`;
  if (name.includes('\\')) return 'folders are separated by forward slashes';
  if (name.includes('\0')) return 'it holds a zero character';
  if (name.length > 1024) return `it has ${name.length} characters, at most 1024 are allowed`;
  if (isAbsolute(name) || /^[a-z]:/i.test(name)) return 'it must be relative to the folders of the server';
  const bad = name.split('/').find((part) => part === '' || part === '.' || part === '..');
  return bad === undefined ? null : `"${bad}" may not be a part of it`;
}

async function inspect(root: Root, path: string, folders: Folders): Promise<FoundFile | 'outside' | null> {
  try {
    const real = await realpath(path);
    if (!isAllowed(real, folders)) return 'outside';
    const info = await stat(real, { bigint: true });
    if (!info.isFile()) return null;
    const name = relative(root.path, path).split(sep).join('/');
    if (root.without !== undefined && name.startsWith(`${root.without}/`)) return null;
    // A file moved into another's place may bear the same time, but not the same inode.
    const version = [info.size, info.ino, info.mtimeNs].map((part) => part.toString(36)).join('-');
    return { name, path: real, sizeBytes: Number(info.size), version };
  } catch {
    return null;
  }
}

function isAllowed(real: string, folders: Folders): boolean {
  return folders.allowed.some(
    (folder) => real === folder || real.startsWith(folder.endsWith(sep) ? folder : folder + sep),
  );
}

async function walk(
  root: Root,
  folder: string,
  depth: number,
  folders: Folders,
  files: Map<string, FoundFile>,
): Promise<void> {
  if (depth > MAX_DEPTH || files.size >= MAX_FILES) return;
  const entries = await readdir(folder, { withFileTypes: true }).catch(() => []);
  for (const entry of entries) {
    if (entry.name.startsWith('.') || (depth === 0 && entry.name === root.without)) continue;
    const path = join(folder, entry.name);
    if (entry.name.endsWith(EXTENSION)) {
      const found = await inspect(root, path, folders);
      if (found !== null && found !== 'outside' && !files.has(found.name)) files.set(found.name, found);
    } else if (entry.isDirectory() || (entry.isSymbolicLink() && (await leadsIn(path, folders)))) {
      await walk(root, path, depth + 1, folders, files);
    }
  }
}

async function leadsIn(path: string, folders: Folders): Promise<boolean> {
  try {
    const real = await realpath(path);
    return isAllowed(real, folders) && (await stat(real)).isDirectory();
  } catch {
    return false;
  }
}
