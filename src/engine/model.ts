/**
 * One loaded UNet: its frozen weights, its adapters and its plans, and the forward that joins them. The only state here is
 * what it owns; which models exist is the engine's business.
 */
import { UnetdError } from '../errors.ts';
import { Arena } from '../gpu/arena.ts';
import type { Device } from '../gpu/device.ts';
import { type Choices, ceilDiv, type Decision, type Storage } from '../gpu/kernel.ts';
import { Plan, type Run, type Timing } from '../gpu/plan.ts';
import type { Readback } from '../gpu/readback.ts';
import { dispatchesOf } from '../gpu/spec.ts';
import { elapsedMs, STOPWATCH_BYTES, type Stopwatch } from '../gpu/stopwatch.ts';
import type { LoraOperands } from '../kernels/gemm.ts';
import { PatchedWeights, type Patching } from '../lora/patched.ts';
import { AdapterPool } from '../lora/pool.ts';
import { AdapterRegistry, type Lease } from '../lora/registry.ts';
import type { AdapterTurnover } from '../lora/shelf.ts';
import { type LoraTable, loraTable, type StackEntry } from '../lora/table.ts';
import type { PatchWork } from '../lora/work.ts';
import type { Layer, UNetConfig } from '../unet/config.ts';
import { layersOf } from '../unet/layers.ts';
import { planUNet, type UNetPlan, type UNetShape } from '../unet/plan.ts';
import type { Weights } from '../unet/weights.ts';
import type { Budget } from './budget.ts';
import type { LoraUse } from './types.ts';

/** Plans kept per model; each holds a parameter buffer and bind groups, all share one arena. */
const MAX_PLANS = 16;

/** Most adapters change few of the layers, and so few of the pages: more of them make the whole budget of use. */
const PAGES_PER_BINDING = 4;

/** What all models of a device share, since forwards run one after another on the GPU. */
export interface Shared {
  readonly device: Device;
  readonly arena: Arena;
  /** T of the low-rank terms: alive from a down projection to the layer behind it. */
  readonly scratch: Arena;
  /** What weights are patched in. */
  readonly work: PatchWork;
  readonly readback: Readback;
  readonly budget: Budget;
  /** Undefined where the adapter has no timestamps. */
  readonly stopwatch: Stopwatch | undefined;
  readonly turnover: AdapterTurnover;
  /** Measured on the device, where it was. */
  readonly choices: Choices | undefined;
}

interface ReadyPlan {
  readonly unet: UNetPlan;
  readonly plan: Plan;
}

/** How the stacks of a batch are applied: by low-rank terms, and by weights that are patched. */
interface Applied {
  readonly table: LoraTable | undefined;
  readonly patching: Patching | undefined;
}

export interface ForwardResult {
  /** [images, outChannels, height, width] in f32. */
  readonly out: Uint8Array;
  readonly gpuMs: number;
}

export class LoadedModel {
  readonly config: UNetConfig;
  readonly storage: Storage;
  readonly weights: Weights;
  readonly adapters: AdapterRegistry;
  readonly #shared: Shared;
  readonly #layers: readonly Layer[];
  readonly #pool: AdapterPool;
  readonly #patched: PatchedWeights;
  readonly #table: Arena;
  readonly #plans = new Map<string, ReadyPlan>();
  #choices: Choices | undefined;

  /**
   * `poolBytes` bounds the adapters, and what is kept of patched weights as well; the pool is cut into so many pages that the
   * largest binding does not.
   */
  constructor(shared: Shared, config: UNetConfig, storage: Storage, weights: Weights, poolBytes: number) {
    this.config = config;
    this.storage = storage;
    this.weights = weights;
    this.#shared = shared;
    this.#choices = shared.choices;
    this.#layers = layersOf(config);
    const least = ceilDiv(poolBytes, shared.device.capabilities.maxBindingBytes);
    const pages = Math.max(1, Math.min(this.#layers.length, least * PAGES_PER_BINDING));
    const { budget, turnover } = shared;
    this.#pool = new AdapterPool(shared.device, storage, this.#layers, {
      pages,
      limitBytes: poolBytes,
      spareBytes: () => budget.spareBytes,
    });
    const makeRoom = (bytes: number): boolean => budget.makeRoom(bytes);
    this.adapters = new AdapterRegistry(config, this.#pool, { budgetBytes: poolBytes, makeRoom, turnover });
    this.#table = new Arena(shared.device, 'lora table');
    this.#patched = new PatchedWeights(shared.device, storage, config, weights, shared.work, {
      limitBytes: poolBytes,
      spareBytes: () => budget.spareBytes,
      ensure: (arena, sizeBytes) =>
        this.#ensure(arena, sizeBytes, 'The weights that LoRAs of this batch patch'),
      blocks: (slot) => this.#pool.operand(slot),
    });
  }

  /** GPU bytes of all pages for adapters, used or not, and of the weights that they patch. */
  get adapterBytes(): number {
    return this.#pool.sizeBytes + this.#patched.sizeBytes;
  }

  /** Copies of weights that can go, and be made again when they are needed. */
  get patched(): Pick<PatchedWeights, 'idleBytes' | 'evictOne'> {
    return this.#patched;
  }

  /**
   * Runs one forward. `feeds` as `batch.ts` names them, `loras` one stack per image. `submitted` is called when its work lies in the
   * queue of the GPU: only then may the caller call this again, and what is written then takes effect behind that work.
   * ERR_UNKNOWN_LORA, ERR_OUT_OF_MEMORY, ERR_TOO_LARGE, ERR_GPU, ERR_DEVICE_LOST.
   */
  async forward(
    shape: UNetShape,
    feeds: ReadonlyMap<string, Uint8Array>,
    loras: readonly (readonly LoraUse[])[],
    submitted: () => void,
  ): Promise<ForwardResult> {
    const ready = await this.#ready(shape);
    const lease = await this.adapters.use(loras.flat().map(({ lora }) => lora));
    try {
      const applied = await this.#prepare(ready, feeds, stacksOf(loras, lease));
      return await this.#run(ready, applied, () => {
        lease.release();
        submitted();
      });
    } finally {
      lease.release();
    }
  }

  async #run(ready: ReadyPlan, applied: Applied, submitted: () => void): Promise<ForwardResult> {
    const { device, arena, stopwatch, readback } = this.#shared;
    const { plan, unet } = ready;
    const { sizeBytes } = unet.out;
    const staging = readback.take(sizeBytes + STOPWATCH_BYTES);
    // In error scopes of its own: while two are on their way, what is reported outside is the error of either.
    const submitting = device.guarded('The forward', () => {
      try {
        const encoder = device.gpu.createCommandEncoder();
        plan.encode(encoder, runOf(applied), stopwatch?.writes);
        encoder.copyBufferToBuffer(arena.buffer, plan.offsetOf(unet.out), staging, 0, sizeBytes);
        stopwatch?.stop(encoder, staging, sizeBytes);
        device.gpu.queue.submit([encoder.finish()]);
        applied.patching?.close(true);
      } finally {
        applied.patching?.close(false);
      }
    });
    submitted();
    const reading = readback.read(staging, sizeBytes + STOPWATCH_BYTES);
    const [{ bytes, waitedMs }] = await Promise.all([reading, submitting]);
    const gpuMs = stopwatch ? elapsedMs(bytes.subarray(sizeBytes)) : waitedMs;
    return { out: bytes.subarray(0, sizeBytes), gpuMs };
  }

  /** Timestamps of every dispatch of one forward; its result is discarded. */
  async profile(
    shape: UNetShape,
    feeds: ReadonlyMap<string, Uint8Array>,
    loras: readonly (readonly LoraUse[])[],
  ): Promise<readonly Timing[]> {
    const ready = await this.#ready(shape);
    const lease = await this.adapters.use(loras.flat().map(({ lora }) => lora));
    try {
      const applied = await this.#prepare(ready, feeds, stacksOf(loras, lease));
      try {
        return await ready.plan.profile(runOf(applied));
      } finally {
        applied.patching?.close(true);
      }
    } finally {
      lease.release();
    }
  }

  /** What the plan of a shape had to choose, dispatch by dispatch. */
  async decisions(shape: UNetShape): Promise<readonly Decision[]> {
    const { unet } = await this.#ready(shape);
    return unet.spec.steps.flatMap(dispatchesOf).flatMap(({ decision }) => decision ?? []);
  }

  /** From now on plans are made with these choices. No forward may be on its way. */
  choose(choices: Choices): void {
    this.#closePlans();
    this.#choices = choices;
  }

  #closePlans(): void {
    for (const { plan } of this.#plans.values()) plan.close();
    this.#plans.clear();
  }

  close(): void {
    this.#closePlans();
    this.adapters.close();
    this.#pool.close();
    this.#patched.close();
    this.#table.close();
    this.weights.close();
  }

  async #ready(shape: UNetShape): Promise<ReadyPlan> {
    const key = JSON.stringify(shape);
    let ready = this.#plans.get(key);
    if (ready) {
      this.#plans.delete(key);
    } else {
      ready = await this.#compile(shape);
      for (const [oldest, { plan }] of this.#plans) {
        if (this.#plans.size < MAX_PLANS) break;
        this.#plans.delete(oldest);
        plan.close();
      }
    }
    this.#plans.set(key, ready);
    await this.#ensure(this.#shared.arena, ready.plan.arenaBytes, 'The activations of this forward');
    return ready;
  }

  /** Grows a shared buffer within the budget. ERR_OUT_OF_MEMORY. */
  async #ensure(arena: Arena, sizeBytes: number, what: string): Promise<void> {
    if (sizeBytes <= arena.sizeBytes) return;
    const { budget } = this.#shared;
    budget.demand(
      what,
      sizeBytes,
      arena.sizeBytes,
      'use a smaller batch or latent, or raise --memory-budget',
    );
    await arena.ensure(sizeBytes);
  }

  async #compile(shape: UNetShape): Promise<ReadyPlan> {
    const { device, arena, scratch } = this.#shared;
    const table = this.#table.operand;
    const t = scratch.operand;
    const lora = (slot: number): LoraOperands => ({ slot, pool: this.#pool.operand(slot), table, t });
    const unet = planUNet(this.config, shape, {
      storage: this.storage,
      capabilities: { ...device.capabilities, tuned: this.#choices },
      weights: this.weights,
      lora,
    });
    return { unet, plan: await Plan.compile(device, arena, unet.spec) };
  }

  /** Uploads feeds and the LoRA table, and finds what the images bind in the place of patched weights. */
  async #prepare(
    { unet, plan }: ReadyPlan,
    feeds: ReadonlyMap<string, Uint8Array>,
    stacks: readonly (readonly StackEntry[])[],
  ): Promise<Applied> {
    const { device, scratch } = this.#shared;
    const reading = this.#patched.read(stacks);
    const table = loraTable(reading?.stacks ?? stacks, this.#layers.length, unet.inputs);
    if (table) {
      const { maxBindingBytes } = device.capabilities;
      if (table.scratchBytes > maxBindingBytes)
        throw new UnetdError(
          'ERR_TOO_LARGE',
          `The LoRA stacks of this batch need ${table.scratchBytes} bytes of scratch, the adapter binds at most ${maxBindingBytes}; use a smaller batch or fewer LoRAs`,
          { needed: table.scratchBytes, limit: maxBindingBytes },
        );
      await this.#table.ensure(table.words.byteLength);
      await this.#ensure(scratch, table.scratchBytes, 'The LoRA stacks of this batch');
      device.gpu.queue.writeBuffer(this.#table.buffer, 0, table.words.buffer);
    }
    const { x, time, context, y, control } = unet.feeds;
    const targets = new Map([
      ['x', x],
      ['time', time],
      ['context', context],
      ...(y ? ([['y', y]] as const) : []),
      ...[...control].map(([name, tensor]) => [`control.${name}`, tensor] as const),
    ]);
    for (const [name, tensor] of targets) {
      const bytes = feeds.get(name);
      if (!bytes) throw new Error(`the feed ${name} is missing`);
      plan.write(tensor, bytes);
    }
    return { table, patching: reading && (await this.#patched.open(reading)) };
  }
}

/** Deals the adapters of a lease, which lie in the order of all stacks one behind the other, out to the images. */
function stacksOf(loras: readonly (readonly LoraUse[])[], lease: Lease): readonly (readonly StackEntry[])[] {
  let at = 0;
  return loras.map((stack) => stack.map(({ strength }) => ({ adapter: lease.adapters[at++]!, strength })));
}

const runOf = ({ table, patching }: Applied): Run => ({
  blocks: (slot) => table?.blocks.get(slot) ?? 0,
  substitutes: patching?.substitutes,
});
