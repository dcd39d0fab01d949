/**
 * Reads a Dockerfile and repeats it without Docker: each stage is a folder, COPY copies, RUN runs with the stage's folder as the root
 * of its paths. What installs system packages is left out. Knows just the instructions that this project's file has.
 */
import { execFile } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);

export interface Instruction {
  readonly name: string;
  readonly text: string;
}

/** What the last stage says about how it runs. */
export interface Image {
  /** The working directory of the image, as a folder here. */
  readonly folder: string;
  readonly env: Readonly<Record<string, string>>;
  /** ENTRYPOINT with CMD. */
  readonly command: readonly string[];
  readonly healthcheck: readonly string[];
  readonly user: string;
}

/** Instructions in order; comments and line continuations are resolved. */
export function parseDockerfile(text: string): readonly Instruction[] {
  const lines = text.replace(/^\s*#.*\n/gm, '').replace(/\\\n\s*/g, '');
  return lines
    .split('\n')
    .filter((line) => line.trim() !== '')
    .map((line) => {
      const [, name = '', rest = ''] = /^([A-Z]+)\s+(.*)$/.exec(line) ?? [];
      return { name, text: rest };
    });
}

/** The paths that come from the build context. */
export function contextPaths(instructions: readonly Instruction[]): readonly string[] {
  return instructions
    .filter(({ name, text }) => name === 'COPY' && !text.startsWith('--from='))
    .flatMap(({ text }) => text.split(/\s+/).slice(0, -1));
}

interface Stage {
  readonly root: string;
  workdir: string;
  readonly env: Record<string, string>;
  readonly last: Map<string, string>;
}

/** Repeats the file with `context` as its build context, in folders under `place`. Throws what a command that fails has printed. */
export async function build(
  instructions: readonly Instruction[],
  context: string,
  place: string,
): Promise<Image> {
  const stages = new Map<string, Stage>();
  let stage: Stage | undefined;
  for (const { name, text } of instructions) {
    if (name === 'FROM') {
      const label = / AS (\w+)$/.exec(text)?.[1] ?? 'last';
      stage = { root: join(place, label), workdir: '/', env: {}, last: new Map() };
      stages.set(label, stage);
    } else if (stage === undefined) throw new Error(`${name} stands before FROM`);
    else if (name === 'WORKDIR') {
      stage.workdir = text;
      mkdirSync(join(stage.root, text), { recursive: true });
    } else if (name === 'COPY') copy(text, stage, stages, context);
    else if (name === 'RUN' && !text.startsWith('apt-get ')) {
      const cwd = join(stage.root, stage.workdir);
      await run('sh', ['-c', text], { cwd, env: { ...process.env, ...stage.env } });
    } else if (name === 'ENV') {
      for (const [, key = '', value = ''] of text.matchAll(/(\w+)=(\S+)/g)) stage.env[key] = value;
    } else stage.last.set(name, text);
  }
  if (stage === undefined) throw new Error('the file has no stage');
  const list = (name: string): string[] =>
    JSON.parse(/\[.*\]$/.exec(stage.last.get(name) ?? '')?.[0] ?? '[]');
  return {
    folder: join(stage.root, stage.workdir),
    env: stage.env,
    command: [...list('ENTRYPOINT'), ...list('CMD')],
    healthcheck: list('HEALTHCHECK'),
    user: stage.last.get('USER') ?? 'root',
  };
}

function copy(text: string, stage: Stage, stages: ReadonlyMap<string, Stage>, context: string): void {
  const [, from, paths = ''] = /^(?:--from=(\w+) )?(.*)$/.exec(text) ?? [];
  const all = paths.split(/\s+/);
  const to = all.pop()!;
  const target = join(stage.root, to.startsWith('/') ? to : join(stage.workdir, to));
  for (const path of all) {
    const source = join(from === undefined ? context : stages.get(from)!.root, path);
    cpSync(source, to.endsWith('/') ? join(target, basename(path)) : target, { recursive: true });
  }
}

/** Whether a path of the context reaches the build: `.dockerignore` here is `*` with exceptions of the first level. */
export function isInContext(path: string, context: string): boolean {
  const rules = readFileSync(join(context, '.dockerignore'), 'utf8').split('\n');
  if (!rules.includes('*')) throw new Error('.dockerignore no longer begins by leaving out everything');
  return existsSync(join(context, path)) && rules.includes(`!${path}`);
}
