/**
 * A plan: a fixed list of dispatches over one arena, compiled once and replayed with one encoder and one submit. Some
 * steps have two forms, with and without low-rank terms; which form runs is decided at each run. Knows no layers.
 */
import { UnetdError } from '../errors.ts';
import { type Arena, place } from './arena.ts';
import { type Device, Usage } from './device.ts';
import { alignTo, type Dispatch, type Storage, type Virtual } from './kernel.ts';
import { recipeOf } from './link.ts';
import type { Compiled } from './pipeline.ts';

export type Step =
  | { readonly kind: 'always'; readonly dispatch: Dispatch }
  /** `base` runs when no image has low-rank terms for the slot, else `down` then `main`. */
  | {
      readonly kind: 'slot';
      readonly slot: number;
      readonly base: readonly Dispatch[];
      readonly down: Dispatch;
      readonly main: readonly Dispatch[];
    };

export interface PlanSpec {
  readonly label: string;
  readonly storage: Storage;
  readonly steps: readonly Step[];
  /** Written before a run; alive from the first step on. */
  readonly feeds: readonly Virtual[];
  /** Read after a run; alive until the last step. */
  readonly results: readonly Virtual[];
}

/** Blocks of the longest stack per slot; 0 where no image has low-rank terms. */
export type SlotBlocks = (slot: number) => number;

interface Ready {
  readonly dispatch: Dispatch;
  readonly compiled: Compiled;
  readonly paramsOffset: number;
  bindGroup: GPUBindGroup | undefined;
}

interface ReadyStep {
  readonly slot: number;
  readonly base: readonly Ready[];
  readonly down?: Ready;
  readonly main: readonly Ready[];
}

/** Timestamps of one dispatch of a profiled run. */
export interface Timing {
  readonly label: string;
  readonly kernel: string;
  readonly ms: number;
  readonly flops: number;
}

function dispatchesOf(step: Step): readonly Dispatch[] {
  return step.kind === 'always' ? [step.dispatch] : [...step.base, step.down, ...step.main];
}

/** Offsets of all virtual tensors, from the first step that names them to the last. */
function layOut(
  spec: PlanSpec,
  alignment: number,
): { offsets: ReadonlyMap<number, number>; totalBytes: number; lowerBoundBytes: number } {
  const lives = new Map<number, { sizeBytes: number; first: number; last: number }>();
  const touch = (tensor: Virtual, at: number): void => {
    const life = lives.get(tensor.id);
    if (!life) lives.set(tensor.id, { sizeBytes: tensor.sizeBytes, first: at, last: at });
    else life.last = Math.max(life.last, at);
  };
  for (const feed of spec.feeds) touch(feed, 0);
  spec.steps.forEach((step, at) => {
    for (const dispatch of dispatchesOf(step))
      for (const operand of Object.values(dispatch.operands))
        if (operand.kind === 'virtual') touch(operand, at);
  });
  for (const result of spec.results) touch(result, spec.steps.length);
  const placement = place([...lives.values()], alignment);
  const offsets = new Map([...lives.keys()].map((id, i) => [id, placement.offsets[i] ?? 0]));
  return { offsets, totalBytes: placement.totalBytes, lowerBoundBytes: placement.lowerBoundBytes };
}

export class Plan {
  readonly label: string;
  readonly arenaBytes: number;
  /** Least bytes any placement of these tensors needs. */
  readonly lowerBoundBytes: number;
  readonly #device: Device;
  readonly #arena: Arena;
  readonly #offsets: ReadonlyMap<number, number>;
  readonly #steps: readonly ReadyStep[];
  readonly #params: GPUBuffer;
  #generation = -1;

  private constructor(
    device: Device,
    arena: Arena,
    spec: PlanSpec,
    placed: ReturnType<typeof layOut>,
    steps: readonly ReadyStep[],
    params: GPUBuffer,
  ) {
    this.label = spec.label;
    this.#device = device;
    this.#arena = arena;
    this.#offsets = placed.offsets;
    this.arenaBytes = placed.totalBytes;
    this.lowerBoundBytes = placed.lowerBoundBytes;
    this.#steps = steps;
    this.#params = params;
  }

  /** Compiles every pipeline and writes all params. ERR_GPU, ERR_TOO_LARGE when a tensor exceeds the adapter's binding size. */
  static async compile(device: Device, arena: Arena, spec: PlanSpec): Promise<Plan> {
    const placed = layOut(spec, device.capabilities.offsetAlignment);
    const stride = alignTo(64, device.capabilities.offsetAlignment);
    const all = spec.steps.flatMap(dispatchesOf);
    for (const dispatch of all) checkLimits(device, spec, dispatch);
    const compiled = await Promise.all(all.map((d) => device.pipelines.get(recipeOf(d), spec.storage)));
    const bytes = new DataView(new ArrayBuffer(Math.max(1, all.length) * stride));
    const ready = all.map((dispatch, i): Ready => {
      writeParams(bytes, i * stride, stride, dispatch);
      return { dispatch, compiled: compiled[i]!, paramsOffset: i * stride, bindGroup: undefined };
    });
    const params = device.createBuffer(
      `${spec.label} params`,
      bytes.byteLength,
      Usage.UNIFORM | Usage.COPY_DST,
    );
    device.gpu.queue.writeBuffer(params, 0, bytes.buffer);
    let at = 0;
    const steps = spec.steps.map((step): ReadyStep => {
      const mine = ready.slice(at, at + dispatchesOf(step).length);
      at += mine.length;
      if (step.kind === 'always') return { slot: -1, base: mine, main: [] };
      const n = step.base.length;
      return { slot: step.slot, base: mine.slice(0, n), down: mine[n]!, main: mine.slice(n + 1) };
    });
    return new Plan(device, arena, spec, placed, steps, params);
  }

  /** Dispatches of a run without low-rank terms. */
  get dispatchCount(): number {
    return this.#steps.reduce((n, step) => n + step.base.length, 0);
  }

  /** Puts bytes into a feed; call before `run`, after the arena has room. */
  write(feed: Virtual, bytes: Uint8Array): void {
    this.#device.gpu.queue.writeBuffer(this.#arena.buffer, this.offsetOf(feed), bytes);
  }

  offsetOf(tensor: Virtual): number {
    const offset = this.#offsets.get(tensor.id);
    if (offset === undefined) throw new Error(`${tensor.label} is no tensor of the plan ${this.label}`);
    return offset;
  }

  /** Encodes the whole plan as one compute pass. */
  encode(
    encoder: GPUCommandEncoder,
    blocks: SlotBlocks = () => 0,
    timestampWrites?: GPUComputePassTimestampWrites,
  ): void {
    const pass = encoder.beginComputePass({
      label: this.label,
      ...(timestampWrites ? { timestampWrites } : {}),
    });
    for (const { ready, grid } of this.#walk(blocks)) this.#dispatch(pass, ready, grid);
    pass.end();
  }

  /** Runs the plan with a pass and two timestamps per dispatch; slower than `encode`. Needs timestamp-query. */
  async profile(blocks: SlotBlocks = () => 0): Promise<readonly Timing[]> {
    const { gpu } = this.#device;
    const walk = [...this.#walk(blocks)];
    const perSet = 2048;
    const timings: Timing[] = [];
    for (let start = 0; start < walk.length; start += perSet) {
      const part = walk.slice(start, start + perSet);
      const querySet = gpu.createQuerySet({ type: 'timestamp', count: part.length * 2 });
      const resolved = this.#device.createBuffer(
        'timestamps',
        part.length * 16,
        Usage.QUERY_RESOLVE | Usage.COPY_SRC,
      );
      const encoder = gpu.createCommandEncoder();
      part.forEach(({ ready, grid }, i) => {
        const timestampWrites = {
          querySet,
          beginningOfPassWriteIndex: 2 * i,
          endOfPassWriteIndex: 2 * i + 1,
        };
        const pass = encoder.beginComputePass({ timestampWrites });
        this.#dispatch(pass, ready, grid);
        pass.end();
      });
      encoder.resolveQuerySet(querySet, 0, part.length * 2, resolved, 0);
      gpu.queue.submit([encoder.finish()]);
      const bytes = await this.#device.read(resolved, 0, part.length * 16);
      const times = new BigUint64Array(bytes.buffer, bytes.byteOffset, part.length * 2);
      part.forEach(({ ready: { dispatch } }, i) => {
        const ms = Number(times[2 * i + 1]! - times[2 * i]!) / 1e6;
        timings.push({ label: dispatch.label, kernel: dispatch.kernel.name, ms, flops: dispatch.flops });
      });
      querySet.destroy();
      resolved.destroy();
    }
    return timings;
  }

  close(): void {
    this.#params.destroy();
  }

  *#walk(blocks: SlotBlocks): Generator<{ ready: Ready; grid: readonly [number, number, number] }> {
    if (this.#generation !== this.#device.generation) {
      for (const { base, down, main } of this.#steps)
        for (const ready of [...base, ...main, ...(down ? [down] : [])]) ready.bindGroup = undefined;
      this.#generation = this.#device.generation;
    }
    for (const { slot, base, down, main } of this.#steps) {
      const count = down ? blocks(slot) : 0;
      if (count > 0 && down)
        yield { ready: down, grid: [count, down.dispatch.grid[1], down.dispatch.grid[2]] };
      for (const ready of count > 0 ? main : base) yield { ready, grid: ready.dispatch.grid };
    }
  }

  #dispatch(pass: GPUComputePassEncoder, ready: Ready, grid: readonly [number, number, number]): void {
    ready.bindGroup ??= this.#bind(ready);
    pass.setPipeline(ready.compiled.pipeline);
    pass.setBindGroup(0, ready.bindGroup);
    pass.dispatchWorkgroups(grid[0], grid[1], grid[2]);
  }

  #bind({ dispatch, compiled, paramsOffset }: Ready): GPUBindGroup {
    const entries: GPUBindGroupEntry[] = [
      { binding: 0, resource: { buffer: this.#params, offset: paramsOffset, size: 64 } },
    ];
    compiled.bound.forEach((name, i) => {
      const operand = dispatch.operands[name]!;
      const resource: GPUBufferBinding =
        operand.kind === 'virtual'
          ? {
              buffer: this.#arena.buffer,
              offset: this.offsetOf(operand),
              size: alignTo(operand.sizeBytes, 4),
            }
          : {
              buffer: operand.current(),
              offset: operand.offset,
              ...(operand.sizeBytes ? { size: operand.sizeBytes } : {}),
            };
      entries.push({ binding: i + 1, resource });
    });
    return this.#device.gpu.createBindGroup({ label: dispatch.label, layout: compiled.layout, entries });
  }
}

function checkLimits(device: Device, spec: PlanSpec, dispatch: Dispatch): void {
  const limit = device.capabilities.maxBindingBytes;
  for (const [name, operand] of Object.entries(dispatch.operands))
    if (operand.sizeBytes > limit)
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `${spec.label}: "${name}" of ${dispatch.label} needs ${operand.sizeBytes} bytes, the adapter binds at most ${limit}; use a smaller batch or latent`,
        { needed: operand.sizeBytes, limit },
      );
  const names = new Map<number, string>();
  for (const [name, operand] of Object.entries(dispatch.operands)) {
    if (operand.kind !== 'virtual') continue;
    const other = names.get(operand.id);
    // WebGPU refuses writable bindings that alias, and all of the arena is bound writable.
    if (other)
      throw new Error(`${dispatch.label}: "${other}" and "${name}" are the same tensor ${operand.label}`);
    names.set(operand.id, name);
  }
  const most = device.gpu.limits.maxComputeWorkgroupsPerDimension;
  if (dispatch.grid.some((n) => n > most))
    throw new UnetdError(
      'ERR_TOO_LARGE',
      `${spec.label}: ${dispatch.label} needs a grid of ${dispatch.grid}, the adapter allows ${most} a side; use a smaller batch or latent`,
    );
}

function writeParams(view: DataView, offset: number, room: number, dispatch: Dispatch): void {
  const fields = Object.entries(dispatch.kernel.params);
  if (fields.length * 4 > room)
    throw new Error(`kernel ${dispatch.kernel.name} has more params than fit ${room} bytes`);
  fields.forEach(([name, type], i) => {
    const value = dispatch.params[name];
    if (value === undefined)
      throw new Error(`${dispatch.label}: param ${name} of ${dispatch.kernel.name} is missing`);
    const at = offset + 4 * i;
    if (type === 'f32') view.setFloat32(at, value, true);
    else if (type === 'i32') view.setInt32(at, value, true);
    else view.setUint32(at, value, true);
  });
}
