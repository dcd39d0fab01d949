/**
 * ComfyUI's own front end in a real browser, used as a user uses it: open a file, change a value, press Run, see the picture.
 * What a workflow should look like is its users' business.
 */
import { type Browser, chromium, type Page } from 'playwright-core';
import { ROOT } from '../launch.ts';
import type { Prompt } from './workflow.ts';

/** Python packages: the front end of ComfyUI 0.3.75, and what ComfyUI's Canny node imports. */
export const PACKAGES: string = `${ROOT}.cache/comfyui/front-end`;
/** Of a run as well: ComfyUI and the server share the cores with the browser. */
const TIMEOUT_MS = 60_000;
/** Whatever tells the user of something wrong. */
const COMPLAINTS = '[role=dialog], .p-toast-message';

/** A workflow as the front end saves and opens it, as far as it is looked at one by one. */
export interface SavedWorkflow {
  readonly id: string;
  readonly nodes: readonly SavedNode[];
  /** Its id, from node and output, to node and input, type. */
  readonly links: readonly (readonly [number, number, number, number, number, string])[];
  readonly extra: { readonly ds?: unknown };
}

export interface SavedNode {
  readonly id: number;
  readonly type: string;
  /** Of the left upper corner, below the title. */
  readonly pos: readonly [number, number];
  readonly size: readonly [number, number];
}

/** What is used of the page's globals: `app` and `LiteGraph` are there for extensions. */
interface Ui {
  readonly document: { querySelector(selectors: string): unknown };
  readonly LiteGraph: { createNode(type: string): GraphNode };
  readonly app?: {
    readonly graph: {
      readonly id: string;
      readonly nodes: readonly GraphNode[];
      readonly links: Readonly<Record<number, { readonly target_id: number; readonly target_slot: number }>>;
      add(node: GraphNode): void;
      remove(node: GraphNode): void;
      getNodeById(id: number): GraphNode;
    };
    graphToPrompt(): Promise<{ readonly workflow: SavedWorkflow; readonly output: Prompt }>;
  };
}

interface GraphNode {
  readonly type: string;
  readonly outputs: readonly { readonly links: readonly number[] | null }[];
  readonly widgets?: readonly { readonly name: string; value: unknown }[];
  readonly imgs?: readonly { readonly src: string; readonly complete: boolean }[];
  connect(output: number, target: GraphNode, input: number): void;
}

type Values = Readonly<Record<string, string | number>>;

export class FrontEnd {
  readonly page: Page;
  readonly #browser: Browser;

  private constructor(browser: Browser, page: Page) {
    this.#browser = browser;
    this.page = page;
  }

  /** Opens the page of a ComfyUI. Nothing but that ComfyUI is reached. */
  static async open(url: string): Promise<FrontEnd> {
    const browser = await chromium.launch({
      executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
      // The user of a container is root, for whom Chromium's sandbox cannot work.
      args: process.getuid?.() === 0 ? ['--no-sandbox'] : [],
    });
    const page = await browser.newPage({ viewport: { width: 1600, height: 900 } });
    page.setDefaultTimeout(TIMEOUT_MS);
    await page.route(
      (to) => !to.href.startsWith(url),
      (route) => route.abort(),
    );
    // Else the first visit begins with a dialog of templates.
    await page.request.post(`${url}/api/settings`, { data: { 'Comfy.TutorialCompleted': true } });
    await page.goto(url);
    // It begins with a workflow of its own, which would else take the place of what is opened.
    await page.waitForFunction(() => (globalThis as unknown as Ui).app?.graph.nodes.length);
    return new FrontEnd(browser, page);
  }

  close(): Promise<void> {
    return this.#browser.close();
  }

  /** Opens a workflow file from disk, and waits until it is the one on the canvas. `id`: what it says that it is. */
  async load(path: string, id: string): Promise<void> {
    await this.page.setInputFiles('#comfy-file-input', path);
    await this.page.waitForFunction((id) => (globalThis as unknown as Ui).app?.graph.id === id, id);
  }

  /** Every dialog and message that is open, as text. */
  complaints(): Promise<readonly string[]> {
    return this.page.$$eval(COMPLAINTS, (shown) => shown.map((each) => each.textContent ?? ''));
  }

  /** The workflow as the front end would save it, and as it would send it. */
  async prompt(): Promise<{ readonly workflow: SavedWorkflow; readonly output: Prompt }> {
    const graphToPrompt = async (): Promise<string> =>
      JSON.stringify(await (globalThis as unknown as Ui).app!.graphToPrompt());
    return JSON.parse(await this.page.evaluate(graphToPrompt));
  }

  /** Sets values, by the names of their inputs, in every node of a class. */
  async set(nodeType: string, values: Values): Promise<void> {
    await this.page.evaluate(
      ([nodeType, values]) => {
        const { graph } = (globalThis as unknown as Ui).app!;
        for (const node of graph.nodes.filter(({ type }) => type === nodeType))
          for (const widget of node.widgets ?? [])
            if (widget.name in values) widget.value = values[widget.name];
      },
      [nodeType, values] as const,
    );
  }

  /** Puts a node of another class in the place of every one of a class; both have one output. */
  async replace(nodeType: string, by: string): Promise<void> {
    await this.page.evaluate(
      ([nodeType, by]) => {
        const { app, LiteGraph } = globalThis as unknown as Ui;
        const { graph } = app!;
        for (const old of graph.nodes.filter(({ type }) => type === nodeType)) {
          const node = LiteGraph.createNode(by);
          graph.add(node);
          const targets = (old.outputs[0]!.links ?? []).map((id) => graph.links[id]!);
          for (const { target_id, target_slot } of targets)
            node.connect(0, graph.getNodeById(target_id), target_slot);
          graph.remove(old);
        }
      },
      [nodeType, by] as const,
    );
  }

  /** Presses Run: what ComfyUI answers to it. */
  async run(): Promise<{ readonly status: number; readonly errors: unknown }> {
    const answering = this.page.waitForResponse((response) => response.url().endsWith('/api/prompt'));
    await this.page.getByTestId('queue-button').click();
    const answer = await answering;
    return { status: answer.status(), errors: (await answer.json()).node_errors };
  }

  /** Where the picture is that the last node shows, when it is there; null where something went wrong before. */
  async picture(nodeType: string): Promise<string | null> {
    const found = await this.page.waitForFunction(
      ([nodeType, complaints]) => {
        const { app, document } = globalThis as unknown as Ui;
        const picture = app!.graph.nodes.find(({ type }) => type === nodeType)?.imgs?.[0];
        const src = picture?.complete ? picture.src : null;
        return src !== null || document.querySelector(complaints) !== null ? { src } : null;
      },
      [nodeType, COMPLAINTS] as const,
    );
    return (await found.jsonValue())!.src;
  }
}
