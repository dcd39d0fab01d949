/**
 * Records dispatches that are no part of a plan into a pass that is open. Their params lie in buffers that are used again
 * after each submit; their operands are buffers with an owner elsewhere.
 */
import { type Device, Usage } from './device.ts';
import { alignTo, type Dispatch, type Storage } from './kernel.ts';
import { recipeOf } from './link.ts';
import { PARAMS_BYTES, writeParams } from './params.ts';
import type { Compiled } from './pipeline.ts';

/** A dispatch whose pipeline is there. */
export interface Recordable {
  readonly dispatch: Dispatch;
  readonly compiled: Compiled;
}

/** Params in one buffer. */
const PER_BUFFER = 256;

export class Recorder {
  readonly #device: Device;
  readonly #label: string;
  readonly #buffers: GPUBuffer[] = [];
  /** Params written since the last submit. */
  #used = 0;

  constructor(device: Device, label: string) {
    this.#device = device;
    this.#label = label;
  }

  /** Compiles what is not compiled yet. ERR_GPU. */
  compile(dispatches: readonly Dispatch[], storage: Storage): Promise<readonly Recordable[]> {
    return Promise.all(
      dispatches.map(async (dispatch) => ({
        dispatch,
        compiled: await this.#device.pipelines.get(recipeOf(dispatch), storage),
      })),
    );
  }

  /** To be called after each submit: what was recorded before it may now be overwritten. */
  submitted(): void {
    this.#used = 0;
  }

  record(pass: GPUComputePassEncoder, { dispatch, compiled }: Recordable): void {
    const { gpu } = this.#device;
    const { buffer, offset } = this.#params(dispatch);
    const entries = compiled.bound.map((name, i): GPUBindGroupEntry => {
      const operand = dispatch.operands[name]!;
      if (operand.kind === 'virtual')
        throw new Error(`${dispatch.label}: ${name} belongs to the arena of a plan`);
      const size = operand.sizeBytes ? { size: operand.sizeBytes } : {};
      return { binding: i + 1, resource: { buffer: operand.current(), offset: operand.offset, ...size } };
    });
    entries.push({ binding: 0, resource: { buffer, offset, size: PARAMS_BYTES } });
    const [x, y, z] = dispatch.grid;
    pass.setPipeline(compiled.pipeline);
    pass.setBindGroup(0, gpu.createBindGroup({ label: dispatch.label, layout: compiled.layout, entries }));
    pass.dispatchWorkgroups(x, y, z);
  }

  close(): void {
    for (const buffer of this.#buffers.splice(0)) buffer.destroy();
  }

  #params(dispatch: Dispatch): { readonly buffer: GPUBuffer; readonly offset: number } {
    const stride = alignTo(PARAMS_BYTES, this.#device.capabilities.offsetAlignment);
    const which = Math.floor(this.#used / PER_BUFFER);
    const usage = Usage.UNIFORM | Usage.COPY_DST;
    const buffer = this.#buffers[which] ?? this.#device.createBuffer(this.#label, PER_BUFFER * stride, usage);
    this.#buffers[which] = buffer;
    const offset = (this.#used % PER_BUFFER) * stride;
    this.#used += 1;
    const bytes = new DataView(new ArrayBuffer(PARAMS_BYTES));
    writeParams(bytes, 0, dispatch);
    this.#device.gpu.queue.writeBuffer(buffer, offset, bytes.buffer);
    return { buffer, offset };
  }
}
