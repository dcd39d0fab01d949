/** Compiles linked modules once each and keeps them; errors name the WGSL file and line. Holds pipelines, nothing else. */
import { UnetdError } from '../errors.ts';
import type { Storage } from './kernel.ts';
import { type Linked, link, type Recipe, recipeKey } from './link.ts';

export interface Compiled {
  readonly pipeline: GPUComputePipeline;
  readonly layout: GPUBindGroupLayout;
  /** Operand names in the order of their binding numbers, which start at 1; the params are at 0. */
  readonly bound: readonly string[];
}

/** GPUShaderStage.COMPUTE, a constant of the WebGPU specification. */
const COMPUTE = 4;

export class PipelineCache {
  readonly #gpu: GPUDevice;
  readonly #compiled = new Map<string, Promise<Compiled>>();

  constructor(gpu: GPUDevice) {
    this.#gpu = gpu;
  }

  get size(): number {
    return this.#compiled.size;
  }

  /** ERR_GPU with `file:line` when the module does not compile. */
  get(recipe: Recipe, storage: Storage): Promise<Compiled> {
    const key = recipeKey(recipe, storage);
    let compiled = this.#compiled.get(key);
    if (!compiled) {
      compiled = this.#compile(key, recipe, link(recipe, storage));
      this.#compiled.set(key, compiled);
    }
    return compiled;
  }

  async #compile(key: string, recipe: Recipe, linked: Linked): Promise<Compiled> {
    const gpu = this.#gpu;
    gpu.pushErrorScope('validation');
    const module = gpu.createShaderModule({ label: key, code: linked.code });
    const moduleError = gpu.popErrorScope();
    const info = await module.getCompilationInfo();
    const errors = info.messages.filter((message) => message.type === 'error');
    if (errors.length > 0) {
      const text = errors.map((e) => `${linked.origin(e.lineNum)}:${e.linePos} ${e.message}`).join('\n');
      await moduleError;
      throw new UnetdError('ERR_GPU', `Cannot compile ${key}:\n${text}`);
    }
    await moduleError;
    const entries: GPUBindGroupLayoutEntry[] = [
      { binding: 0, visibility: COMPUTE, buffer: { type: 'uniform' } },
      ...linked.bound.map((name, index) => ({
        binding: index + 1,
        visibility: COMPUTE,
        buffer: {
          type: recipe.kernel.bindings[name]?.access === 'read' ? 'read-only-storage' : 'storage',
        } as GPUBufferBindingLayout,
      })),
    ];
    const layout = gpu.createBindGroupLayout({ label: key, entries });
    try {
      const pipeline = await gpu.createComputePipelineAsync({
        label: key,
        layout: gpu.createPipelineLayout({ bindGroupLayouts: [layout] }),
        compute: { module, entryPoint: 'main' },
      });
      return { pipeline, layout, bound: linked.bound };
    } catch (error) {
      throw new UnetdError(
        'ERR_GPU',
        `Cannot build ${key}: ${error instanceof Error ? error.message : error}`,
      );
    }
  }
}
