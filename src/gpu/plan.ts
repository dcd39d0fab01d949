/**
 * A plan: a fixed list of dispatches over one arena, compiled once and replayed with one encoder and one submit. Some
 * steps have two forms, with and without low-rank terms; which form runs is decided at each run, and so is what some
 * images bind in the place of a tensor of the model. Knows no layers.
 */
import type { Arena } from './arena.ts';
import { type Device, Usage } from './device.ts';
import { alignTo, type Virtual } from './kernel.ts';
import { recipeOf } from './link.ts';
import { PARAMS_BYTES, writeParams } from './params.ts';
import { checkLimits, dispatchesOf, layOut, type PlanSpec } from './spec.ts';
import type { Part } from './substitutes.ts';
import { type Ready, type ReadyStep, type Run, readyOf, readyStep, type Visit, walk } from './walk.ts';

export type { PlanSpec, Step } from './spec.ts';
export type { Run, SlotBlocks } from './walk.ts';

/** Bind groups kept per dispatch for its parts. */
const MAX_PARTS = 64;

/** Timestamps of one dispatch of a profiled run. */
export interface Timing {
  readonly label: string;
  readonly kernel: string;
  readonly variant: string;
  /** Of the choice of the variant, where there was one. */
  readonly point: string | undefined;
  readonly ms: number;
  readonly flops: number;
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
  /** Most images of a dispatch that can be run in parts. */
  readonly #images: number;
  /** Params of the dispatches that can be run in parts, by first image: made when the first part runs. */
  #partParams: GPUBuffer | undefined;
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
    this.#images = Math.max(1, ...this.#all().map(imagesOf));
  }

  /** Compiles every pipeline and writes all params. ERR_GPU, ERR_TOO_LARGE when a tensor exceeds the adapter's binding size. */
  static async compile(device: Device, arena: Arena, spec: PlanSpec): Promise<Plan> {
    const placed = layOut(spec, device.capabilities.offsetAlignment);
    const stride = strideOf(device);
    const all = spec.steps.flatMap(dispatchesOf);
    for (const dispatch of all) checkLimits(device, spec, dispatch);
    const compiled = await Promise.all(all.map((d) => device.pipelines.get(recipeOf(d), spec.storage)));
    const bytes = new DataView(new ArrayBuffer(Math.max(1, all.length) * stride));
    const ready = all.map((dispatch, i): Ready => {
      writeParams(bytes, i * stride, dispatch);
      return {
        dispatch,
        grid: dispatch.grid,
        compiled: compiled[i]!,
        index: i,
        bindGroup: undefined,
        parts: new Map(),
      };
    });
    const params = device.createBuffer(
      `${spec.label} params`,
      bytes.byteLength,
      Usage.UNIFORM | Usage.COPY_DST,
    );
    device.gpu.queue.writeBuffer(params, 0, bytes.buffer);
    const rest = [...ready];
    const steps = spec.steps.map((step) => readyStep(step, ({ length }) => rest.splice(0, length)));
    return new Plan(device, arena, spec, placed, steps, params);
  }

  /** Dispatches of a run without low-rank terms. */
  get dispatchCount(): number {
    let count = 0;
    this.#walk({}, () => {
      count += 1;
    });
    return count;
  }

  /** Puts bytes into a feed; call before `run`, after the arena has room. */
  write(feed: Virtual, bytes: Uint8Array): void {
    this.#device.gpu.queue.writeBuffer(this.#arena.buffer, this.offsetOf(feed), bytes);
  }

  offsetOf(tensor: Virtual): number {
    const { tensor: whole, offset: start } = tensor.within ?? { tensor, offset: 0 };
    const offset = this.#offsets.get(whole.id);
    if (offset === undefined) throw new Error(`${tensor.label} is no tensor of the plan ${this.label}`);
    return offset + start;
  }

  /** Encodes the whole plan as one compute pass. */
  encode(encoder: GPUCommandEncoder, run: Run = {}, timestampWrites?: GPUComputePassTimestampWrites): void {
    const pass = encoder.beginComputePass({
      label: this.label,
      ...(timestampWrites ? { timestampWrites } : {}),
    });
    this.#walk(run, this.#into(pass));
    pass.end();
  }

  /** Runs the plan with a pass and two timestamps per dispatch; slower than `encode`. Needs timestamp-query. */
  async profile(run: Run = {}): Promise<readonly Timing[]> {
    const { gpu } = this.#device;
    const turns: Parameters<Visit>[] = [];
    this.#walk(run, (...turn) => turns.push(turn));
    const perSet = 2048;
    const timings: Timing[] = [];
    for (let start = 0; start < turns.length; start += perSet) {
      const part = turns.slice(start, start + perSet);
      const querySet = gpu.createQuerySet({ type: 'timestamp', count: part.length * 2 });
      const resolved = this.#device.createBuffer(
        'timestamps',
        part.length * 16,
        Usage.QUERY_RESOLVE | Usage.COPY_SRC,
      );
      const encoder = gpu.createCommandEncoder();
      part.forEach((turn, i) => {
        const timestampWrites = {
          querySet,
          beginningOfPassWriteIndex: 2 * i,
          endOfPassWriteIndex: 2 * i + 1,
        };
        const pass = encoder.beginComputePass({ timestampWrites });
        this.#into(pass)(...turn);
        pass.end();
      });
      encoder.resolveQuerySet(querySet, 0, part.length * 2, resolved, 0);
      gpu.queue.submit([encoder.finish()]);
      const bytes = await this.#device.read(resolved, 0, part.length * 16);
      const times = new BigUint64Array(bytes.buffer, bytes.byteOffset, part.length * 2);
      part.forEach(([{ dispatch }], i) => {
        const ms = Number(times[2 * i + 1]! - times[2 * i]!) / 1e6;
        const { label, kernel, variant, decision, flops } = dispatch;
        timings.push({ label, kernel: kernel.name, variant, point: decision?.point, ms, flops });
      });
      querySet.destroy();
      resolved.destroy();
    }
    return timings;
  }

  close(): void {
    this.#params.destroy();
    this.#partParams?.destroy();
  }

  #all(): readonly Ready[] {
    return this.#steps.flatMap(readyOf);
  }

  #walk(run: Run, visit: Visit): void {
    if (this.#generation !== this.#device.generation) {
      for (const ready of this.#all()) {
        ready.bindGroup = undefined;
        ready.parts.clear();
      }
      this.#generation = this.#device.generation;
    }
    for (const step of this.#steps) walk(step, run, visit);
  }

  /** Encodes what it visits into a pass. The three calls of the bindings cost about a microsecond each; the rest adds a tenth. */
  #into(pass: GPUComputePassEncoder): Visit {
    return (ready, grid, part) => {
      if (part) for (const substitute of part.substitutes.values()) substitute.ready(pass);
      pass.setPipeline(ready.compiled.pipeline);
      pass.setBindGroup(0, part ? this.#bindPart(ready, part) : this.#bindWhole(ready));
      pass.dispatchWorkgroups(grid[0], grid[1], grid[2]);
    };
  }

  #bindWhole(ready: Ready): GPUBindGroup {
    ready.bindGroup ??= this.#bind(ready, this.#params, ready.index * strideOf(this.#device));
    return ready.bindGroup;
  }

  #bindPart(ready: Ready, part: Part): GPUBindGroup {
    const key = [part.image0, ...[...part.substitutes].map(([name, { id }]) => `${name}=${id}`)].join(' ');
    let bindGroup = ready.parts.get(key);
    if (!bindGroup) {
      if (ready.parts.size >= MAX_PARTS) ready.parts.clear();
      this.#partParams ??= this.#device.createBuffer(
        `${this.label} params of parts`,
        this.#params.size * this.#images,
        Usage.UNIFORM | Usage.COPY_DST,
      );
      const offset = (ready.index * this.#images + part.image0) * strideOf(this.#device);
      const bytes = new DataView(new ArrayBuffer(PARAMS_BYTES));
      writeParams(bytes, 0, ready.dispatch, { image0: part.image0 });
      this.#device.gpu.queue.writeBuffer(this.#partParams, offset, bytes.buffer);
      bindGroup = this.#bind(ready, this.#partParams, offset, part);
      ready.parts.set(key, bindGroup);
    }
    return bindGroup;
  }

  #bind({ dispatch, compiled }: Ready, params: GPUBuffer, offset: number, part?: Part): GPUBindGroup {
    const entries = compiled.bound.map((name, i): GPUBindGroupEntry => {
      const operand = dispatch.operands[name]!;
      if (operand.kind === 'virtual') {
        const place = { offset: this.offsetOf(operand), size: alignTo(operand.sizeBytes, 4) };
        return { binding: i + 1, resource: { buffer: this.#arena.buffer, ...place } };
      }
      const size = operand.sizeBytes ? { size: operand.sizeBytes } : {};
      const substitute = part?.substitutes.get(name);
      const resource = substitute
        ? { buffer: substitute.current(), offset: operand.tensor!.offset, ...size }
        : { buffer: operand.current(), offset: operand.offset, ...size };
      return { binding: i + 1, resource };
    });
    entries.unshift({ binding: 0, resource: { buffer: params, offset, size: PARAMS_BYTES } });
    return this.#device.gpu.createBindGroup({ label: dispatch.label, layout: compiled.layout, entries });
  }
}

const strideOf = ({ capabilities }: Device): number => alignTo(PARAMS_BYTES, capabilities.offsetAlignment);

/** Images that a dispatch counts along its grid. */
const imagesOf = ({ dispatch: { grid, imageAxis } }: Ready): number => (imageAxis ? grid[imageAxis] : 1);
