/**
 * A real ComfyUI as a child process, driven through its HTTP API as its own front end drives it: queue a workflow, follow it
 * on the WebSocket, fetch what it saved. Knows no workflow.
 */
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { WebSocket } from 'ws';
import { freePort, ROOT } from '../launch.ts';
import { Child } from './child.ts';
import { hintPicture, type Latent, type Picture, readLatent, readPicture } from './pictures.ts';
import { MODELS } from './server.ts';
import type { Prompt } from './workflow.ts';

export const VERSIONS = ['0.3.75', '0.3.52'] as const;
export type Version = (typeof VERSIONS)[number];

const ENVIRONMENT = `${ROOT}.cache/reference-env`;
const START_TIMEOUT_MS = 120_000;
const STEP_TIMEOUT_MS = 60_000;
/** The name that workflows give the node whose progress counts. */
const SAMPLER = 'sampler';

export interface Result {
  readonly latents: readonly Latent[];
  readonly pictures: readonly Picture[];
  /** Steps announced to the progress bar, in order. */
  readonly progress: readonly number[];
  /** How many pictures of unfinished steps were sent. */
  readonly previews: number;
  /** Text that nodes showed. */
  readonly texts: readonly string[];
}

/** How a workflow that gave no result ended. */
export class WorkflowError extends Error {
  readonly kind: 'refused' | 'error' | 'interrupted';
  /** The class of the node that raised it. */
  readonly nodeType: string;

  constructor(kind: WorkflowError['kind'], nodeType: string, message: string) {
    super(message);
    this.kind = kind;
    this.nodeType = nodeType;
  }
}

export interface Job {
  readonly id: string;
  /** Rejects with a WorkflowError. */
  readonly done: Promise<Result>;
  /** Resolves when the sampler has announced so many steps. */
  reached(step: number): Promise<void>;
}

export interface NodeInfo {
  /** Where its class is: `nodes` and `comfy_extras.*` are ComfyUI's own. */
  readonly python_module: string;
  /** Name of an input -> its type, or its choices, and further properties. */
  readonly input: { readonly required: Readonly<Record<string, readonly unknown[]>> };
}

/** How a ComfyUI differs from the one that most tests need. */
export interface Setting {
  readonly environment?: Readonly<Record<string, string>>;
  /** A folder of model files in ComfyUI's layout. */
  readonly models?: string;
  /** A folder of Python packages that has the front end; without it there is none. */
  readonly packages?: string;
}

interface Follower {
  readonly progress: number[];
  previews: number;
  finish: (error: WorkflowError | null) => void;
}

interface Message {
  readonly type: string;
  readonly data: Readonly<Record<string, unknown>>;
}

interface SavedFile {
  readonly filename: string;
  readonly subfolder: string;
  readonly type: string;
}

export class ComfyUI {
  readonly version: Version;
  readonly child: Child;
  readonly #origin: string;
  readonly #base: string;
  readonly #clientId: string = randomUUID();
  readonly #followers = new Map<string, Follower>();
  #socket: WebSocket | null = null;

  private constructor(version: Version, child: Child, port: number, base: string) {
    this.version = version;
    this.child = child;
    this.#origin = `127.0.0.1:${port}`;
    this.#base = base;
  }

  /** Starts a ComfyUI in a folder of its own, with the node pack and the test node, and waits until it answers. */
  static async start(version: Version, setting: Setting = {}): Promise<ComfyUI> {
    const { environment, models = MODELS, packages } = setting;
    const base = makeBase(models);
    const port = await freePort();
    const python = `${ENVIRONMENT}/venv/bin/python`;
    const args = [
      ...['main.py', '--cpu', '--listen', '127.0.0.1', '--port', String(port), '--disable-auto-launch'],
      ...['--base-directory', base, '--database-url', `sqlite:///${base}/comfyui.db`],
      ...(packages === undefined ? ['--front-end-root', join(base, 'front-end')] : []),
      ...['--fp32-unet', '--fp32-vae', '--fp32-text-enc', '--preview-method', 'latent2rgb'],
      '--disable-api-nodes',
    ];
    const child = new Child(`ComfyUI ${version}`, python, args, `${ENVIRONMENT}/comfyui-${version}`, {
      PYTHONUNBUFFERED: '1',
      HF_HUB_OFFLINE: '1',
      // Threads that wait for each other must not take the cores that the server's software adapter needs.
      OMP_WAIT_POLICY: 'PASSIVE',
      ...(packages === undefined ? {} : { PYTHONPATH: packages }),
      ...environment,
    });
    const comfyui = new ComfyUI(version, child, port, base);
    await child.until('it answered', START_TIMEOUT_MS, async () => {
      const response = await comfyui.#get('/system_stats').catch(() => undefined);
      return response?.ok ? true : undefined;
    });
    // ComfyUI goes on without a pack that it cannot import.
    for (const nodeType of ['UnetdLoadCheckpoint', 'TestConditioning'])
      if ((await comfyui.nodeInfo(nodeType)) === undefined)
        throw new Error(`ComfyUI ${version} has no node ${nodeType}. It printed:\n${child.output}`);
    await comfyui.#follow();
    return comfyui;
  }

  /** Of its front end. */
  get url(): string {
    return `http://${this.#origin}`;
  }

  /** What the front end knows of a node class, the choices of its dropdowns included. */
  async nodeInfo(nodeType: string): Promise<NodeInfo | undefined> {
    const all = (await (await this.#get(`/object_info/${nodeType}`)).json()) as Record<string, NodeInfo>;
    return all[nodeType];
  }

  async run(prompt: Prompt): Promise<Result> {
    return (await this.submit(prompt)).done;
  }

  /** Queues a workflow. Throws a WorkflowError of kind `refused` where ComfyUI's validation does. */
  async submit(prompt: Prompt): Promise<Job> {
    const id = randomUUID();
    const progress: number[] = [];
    const follower: Follower = { progress, previews: 0, finish: () => {} };
    const finished = new Promise<void>((resolve, reject) => {
      follower.finish = (error) => (error === null ? resolve() : reject(error));
    });
    this.#followers.set(id, follower);
    const done = finished.then(() => this.#collect(id, follower)).finally(() => this.#followers.delete(id));
    // Whoever submitted it looks at it when ready to.
    done.catch(() => {});
    const body = { prompt, prompt_id: id, client_id: this.#clientId };
    const response = await this.#post('/prompt', body);
    if (!response.ok) throw new WorkflowError('refused', '', await response.text());
    const given = ((await response.json()) as { prompt_id: string }).prompt_id;
    if (given !== id) throw new Error(`ComfyUI ${this.version} gave the workflow another id: ${given}.`);
    const reached = async (step: number): Promise<void> => {
      const seen = async (): Promise<true | undefined> => progress.some((each) => each >= step) || undefined;
      await this.child.until(`step ${step} of the workflow`, STEP_TIMEOUT_MS, seen);
    };
    return { id, done, reached };
  }

  async interrupt(): Promise<void> {
    await this.#post('/interrupt', {});
  }

  async close(): Promise<void> {
    this.#socket?.terminate();
    await this.child.end('SIGKILL');
    rmSync(this.#base, { recursive: true, force: true });
  }

  async #follow(): Promise<void> {
    const socket = new WebSocket(`ws://${this.#origin}/ws?clientId=${this.#clientId}`);
    socket.on('message', (data, isBinary) => {
      if (!isBinary) this.#onMessage(JSON.parse(String(data)) as Message);
      // It does not say whose it is, but one workflow runs at a time.
      else for (const follower of this.#followers.values()) follower.previews += 1;
    });
    await once(socket, 'open');
    this.#socket = socket;
  }

  #onMessage({ type, data }: Message): void {
    const follower = this.#followers.get(String(data.prompt_id));
    if (follower === undefined) return;
    const nodeType = String(data.node_type);
    if (type === 'progress' && data.node === SAMPLER) follower.progress.push(Number(data.value));
    if (type === 'execution_success') follower.finish(null);
    if (type === 'execution_interrupted') follower.finish(new WorkflowError('interrupted', nodeType, type));
    if (type === 'execution_error')
      follower.finish(new WorkflowError('error', nodeType, String(data.exception_message)));
  }

  async #collect(id: string, { progress, previews }: Follower): Promise<Result> {
    // The history has the results of nodes that ComfyUI took from its cache too.
    const outputs = await this.child.until('the history held the workflow', 10_000, async () => {
      const history = (await (await this.#get(`/history/${id}`)).json()) as Record<
        string,
        { outputs: object }
      >;
      return history[id]?.outputs;
    });
    const of = (kind: string): unknown[] =>
      Object.values(outputs).flatMap((output: Record<string, unknown[]>) => output[kind] ?? []);
    const fetched = (kind: string): Promise<Buffer[]> =>
      Promise.all((of(kind) as SavedFile[]).map((file) => this.#saved(file)));
    return {
      latents: (await fetched('latents')).map(readLatent),
      pictures: (await fetched('images')).map(readPicture),
      texts: of('text').map(String),
      progress,
      previews,
    };
  }

  async #saved({ filename, subfolder, type }: SavedFile): Promise<Buffer> {
    const response = await this.#get(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    return Buffer.from(await response.arrayBuffer());
  }

  #get(path: string): Promise<Response> {
    return fetch(`http://${this.#origin}${path}`);
  }

  #post(path: string, body: object): Promise<Response> {
    const headers = { 'content-type': 'application/json' };
    return fetch(`http://${this.#origin}${path}`, { method: 'POST', headers, body: JSON.stringify(body) });
  }
}

/** A base directory as users have it: models, custom nodes, and a picture to start from. */
function makeBase(models: string): string {
  const base = mkdtempSync(join(tmpdir(), 'unetd-comfyui-'));
  for (const folder of ['custom_nodes', 'input', 'output', 'temp', 'user', 'front-end'])
    mkdirSync(join(base, folder));
  symlinkSync(models, join(base, 'models'));
  symlinkSync(`${ROOT}comfyui`, join(base, 'custom_nodes/unetd'));
  symlinkSync(`${ROOT}test/comfyui/nodes`, join(base, 'custom_nodes/test_conditioning'));
  for (const name of ['hint.png', 'example.png'])
    writeFileSync(join(base, 'input', name), hintPicture(128, 128));
  return base;
}
