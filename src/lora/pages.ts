/**
 * The buffers that adapters lie in: pages that grow by themselves, under one limit for all. Owns them; what lies where is
 * the pool's business, and which part of a page is free that of `stretches.ts`.
 */
import { UnetdError } from '../errors.ts';
import { type Device, Usage } from '../gpu/device.ts';
import type { Resident } from '../gpu/kernel.ts';
import { Stretches } from './stretches.ts';

export interface PageOptions {
  /** How many; each may grow to the largest binding of the adapter. */
  readonly pages: number;
  /** Most bytes of all pages together. */
  readonly limitBytes?: number;
  /** GPU bytes that may be taken now, asked for at each growth. */
  readonly spareBytes?: () => number;
}

export interface Page {
  buffer: GPUBuffer | undefined;
  readonly stretches: Stretches;
}

const FIRST_PAGE_BYTES = 64 * 1024;

export class Pages {
  readonly all: readonly Page[];
  /** Bytes of four stored values. */
  readonly quadBytes: number;
  readonly #device: Device;
  readonly #options: PageOptions;
  #closed = false;

  constructor(device: Device, quadBytes: number, options: PageOptions) {
    this.#device = device;
    this.quadBytes = quadBytes;
    this.#options = options;
    this.all = Array.from({ length: options.pages }, () => ({
      buffer: undefined,
      stretches: new Stretches(),
    }));
  }

  /** GPU bytes of all pages, used or not. */
  get sizeBytes(): number {
    return this.all.reduce((sum, page) => sum + (page.buffer?.size ?? 0), 0);
  }

  /** Most quads of one page. */
  get limit(): number {
    const { maxBindingBytes, maxBufferBytes } = this.#device.capabilities;
    return Math.floor(Math.min(maxBindingBytes, maxBufferBytes) / this.quadBytes);
  }

  get isClosed(): boolean {
    return this.#closed;
  }

  /** Grows a page once for all that is to come into it; false where it cannot hold that. */
  async prepare(page: Page, quads: number): Promise<boolean> {
    const { size, end, free } = page.stretches;
    const holes = free.reduce((sum, stretch) => sum + stretch.quads, 0) - (size - end);
    const missing = quads - holes;
    return end + missing <= size || this.#grow(page, missing);
  }

  /** The offset, in quads, of a stretch that was free; undefined where the page has none as long and cannot grow. */
  async take(page: Page, quads: number): Promise<number | undefined> {
    return (
      page.stretches.take(quads) ?? ((await this.#grow(page, quads)) ? page.stretches.take(quads) : undefined)
    );
  }

  write(page: Page, offset: number, bytes: Uint8Array): void {
    this.#device.gpu.queue.writeBuffer(page.buffer!, offset * this.quadBytes, bytes);
  }

  close(): void {
    this.#closed = true;
    for (const page of this.all) page.buffer?.destroy();
  }

  /** Doubles a page, or more where `quads` need it; false at the limit of a binding, of all pages or of the GPU. */
  async #grow(page: Page, quads: number): Promise<boolean> {
    const { size, end } = page.stretches;
    const least = end + quads;
    if (least > this.limit) return false;
    // Pages that shrank in use give their tails back only when another page needs them.
    if (least - size > this.#spareQuads()) await this.#trim(page);
    const spare = this.#spareQuads();
    if (least - size > spare) return false;
    const wanted = Math.max(size * 2, least, FIRST_PAGE_BYTES / this.quadBytes);
    return this.#resize(page, Math.min(this.limit, size + spare, wanted));
  }

  #spareQuads(): number {
    const { limitBytes = Number.POSITIVE_INFINITY, spareBytes } = this.#options;
    const bytes = Math.min(limitBytes - this.sizeBytes, spareBytes?.() ?? Number.POSITIVE_INFINITY);
    // Buffers come in whole 16 bytes.
    return (Math.floor(bytes / 16) * 16) / this.quadBytes;
  }

  async #trim(except: Page): Promise<void> {
    for (const page of this.all)
      if (page !== except && page.stretches.end < page.stretches.size)
        await this.#resize(page, page.stretches.end);
  }

  /** Moves a page to a buffer of another size, its contents at the same offsets; false where the GPU has no memory for it. */
  async #resize(page: Page, quads: number): Promise<boolean> {
    const usage = Usage.STORAGE | Usage.COPY_DST | Usage.COPY_SRC;
    let buffer: GPUBuffer | undefined;
    try {
      if (quads > 0)
        buffer = await this.#device.guarded('adapters', () =>
          this.#device.createBuffer('adapters', quads * this.quadBytes, usage),
        );
    } catch (error) {
      if (UnetdError.from(error).code === 'ERR_OUT_OF_MEMORY') return false;
      throw error;
    }
    if (this.#closed) {
      buffer?.destroy();
      return false;
    }
    const keep = page.stretches.end * this.quadBytes;
    if (page.buffer && buffer && keep > 0) {
      const encoder = this.#device.gpu.createCommandEncoder();
      encoder.copyBufferToBuffer(page.buffer, 0, buffer, 0, keep);
      this.#device.gpu.queue.submit([encoder.finish()]);
    }
    page.buffer?.destroy();
    page.buffer = buffer;
    page.stretches.resize(quads);
    this.#device.generation += 1;
    return true;
  }
}

/** A page as an operand, whichever buffer it has then. */
export function operandOf(page: Page): Resident {
  const current = (): GPUBuffer => {
    if (!page.buffer) throw new Error('no adapter lies in this page');
    return page.buffer;
  };
  return { kind: 'resident', label: 'adapters', current, offset: 0, sizeBytes: 0 };
}
