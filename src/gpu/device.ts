/**
 * Opens a GPU device and owns it: instance, adapter facts, limits, compiled pipelines, error reporting. It knows nothing
 * of models or plans. One `Device` is passed to whoever needs it; there is no global one.
 */
import { create, globals } from 'webgpu';
import { UnetdError } from '../errors.ts';
import { type Capabilities, isSoftware, type MatrixShape } from './kernel.ts';
import { PipelineCache } from './pipeline.ts';

interface WebGpuGlobals {
  readonly GPUBufferUsage: typeof GPUBufferUsage;
  readonly GPUMapMode: typeof GPUMapMode;
}

// The bindings type their globals as Object; nothing is put on globalThis, or node would not exit.
const webgpu = globals as unknown as WebGpuGlobals;
/** GPUMapMode of the WebGPU specification. */
export const MapMode: typeof GPUMapMode = webgpu.GPUMapMode;

/** GPUBufferUsage of the WebGPU specification. */
export const Usage: typeof GPUBufferUsage = webgpu.GPUBufferUsage;

export interface AdapterFacts {
  readonly name: string;
  readonly backend: string;
}

export interface DeviceOptions {
  /** Part of an adapter's name as `listAdapters` gives it; any adapter when left out. */
  readonly adapter?: string | undefined;
  /** `null`: compiles and validates everything, runs nothing, needs no driver. */
  readonly backend?: 'null' | undefined;
  /** Lowers the largest binding, to try the splitting of large tensors on any adapter. */
  readonly maxBindingBytes?: number | undefined;
  /** Asks for no more than the limits that WebGPU guarantees everywhere, to prove that plans keep within them. */
  readonly defaultLimits?: boolean | undefined;
}

/** The backend Dawn's node bindings choose; an adapter does not tell its own. */
const PLATFORM_BACKENDS: Readonly<Record<string, string>> = {
  linux: 'vulkan',
  darwin: 'metal',
  win32: 'd3d12',
};

/** Turns of the event loop before waiting slows them, and how long each lasts then. */
const QUICK_TURNS = 100;
const TURN_MS = 1;
const NEVER_WOKEN: Int32Array<SharedArrayBuffer> = new Int32Array(new SharedArrayBuffer(4));

const INSTALL_HINT =
  'install a Vulkan driver (your GPU vendor\'s, or Mesa\'s software driver: "npm run driver" does it on Debian)';

/** Of an instance: without them adapters hide subgroup matrices, and on NVIDIA halves. */
export const DAWN_FEATURES = 'enable-dawn-features=allow_unsafe_apis,vulkan_enable_f16_on_nvidia';

function createInstance(options: DeviceOptions): GPU {
  return create([
    DAWN_FEATURES,
    'disable-dawn-features=timestamp_quantization',
    ...(options.backend ? [`backend=${options.backend}`] : []),
    ...(options.adapter ? [`adapter=${options.adapter}`] : []),
  ]);
}

/**
 * The adapters this machine offers. The bindings have no call for it: asked for a name that none bears, they list all
 * in the error they throw.
 */
export async function listAdapters(): Promise<readonly AdapterFacts[]> {
  try {
    await create(['adapter=\u0001']).requestAdapter();
  } catch (error) {
    const lines = String(error).matchAll(/backend: '([^']*)', name: '([^']*)'/g);
    return [...lines].map(([, backend = '', name = '']) => ({ backend, name }));
  }
  return [];
}

/** A feature of Dawn that the types do not know. */
const MATRIX_FEATURE = 'chromium-experimental-subgroup-matrix' as GPUFeatureName;

/** Of Dawn's adapter info, which the types do not know either. */
export interface MatrixConfig {
  readonly componentType: string;
  readonly resultComponentType: string;
  readonly M: number;
  readonly N: number;
  readonly K: number;
}

/** What a device with these features multiplies with matrix units, added in f32. */
function matricesOf(info: GPUAdapterInfo, features: GPUSupportedFeatures): readonly MatrixShape[] {
  if (!features.has(MATRIX_FEATURE)) return [];
  const { subgroupMatrixConfigs } = info as { subgroupMatrixConfigs?: readonly MatrixConfig[] };
  return (subgroupMatrixConfigs ?? []).flatMap(({ componentType: input, resultComponentType, M, N, K }) =>
    resultComponentType === 'f32' && (input === 'f32' || (input === 'f16' && features.has('shader-f16')))
      ? [{ m: M, n: N, k: K, input }]
      : [],
  );
}

async function requestAdapter(instance: GPU, options: DeviceOptions): Promise<GPUAdapter> {
  let adapter: GPUAdapter | null = null;
  try {
    adapter = await instance.requestAdapter({ powerPreference: 'high-performance' });
  } catch {
    // Thrown where no adapter has the asked name, or none exists at all; said below.
  }
  if (adapter) return adapter;
  const found = await listAdapters();
  if (found.length > 0 && options.adapter)
    throw new UnetdError(
      'ERR_NO_ADAPTER',
      `No GPU adapter is named like "${options.adapter}"; found ${found.map((a) => `"${a.name}"`).join(', ')}`,
      { asked: options.adapter, found },
    );
  throw new UnetdError('ERR_NO_ADAPTER', `No usable GPU adapter was found; ${INSTALL_HINT}`, { found });
}

/** One that is waited for, and what the driver reported meanwhile: nobody knows whose error that is. */
interface Wait {
  failure: string | undefined;
}

export class Device {
  readonly adapter: AdapterFacts & {
    readonly features: readonly string[];
    /** The GPU itself, and what drives it, with its version where the adapter tells that. */
    readonly hardware: string;
    readonly driver: string;
  };
  readonly capabilities: Capabilities;
  readonly gpu: GPUDevice;
  readonly pipelines: PipelineCache;
  /** Resolves with the reason when the device is lost; never rejects. */
  readonly lost: Promise<string>;
  /** Grows whenever a buffer that plans bind is replaced; bind groups made before are stale. */
  generation = 0;

  // Collected while the device lives, the instance takes the whole process down.
  readonly #instance: GPU;
  #failure: string | undefined;
  readonly #waits = new Set<Wait>();
  #isSlowed = false;

  private constructor(instance: GPU, adapter: GPUAdapter, gpu: GPUDevice, options: DeviceOptions) {
    this.#instance = instance;
    this.gpu = gpu;
    const { info } = adapter;
    const backend = options.backend ?? PLATFORM_BACKENDS[process.platform] ?? 'unknown';
    this.adapter = {
      name: info.description || info.device || 'unnamed adapter',
      backend,
      features: [...gpu.features].sort(),
      hardware: `${info.vendor} ${info.device}`,
      driver: `${backend} ${info.description}`,
    };
    const fixed = info.subgroupMinSize === info.subgroupMaxSize && gpu.features.has('subgroups');
    this.capabilities = {
      subgroupSize: fixed ? (info.subgroupMinSize ?? 0) : 0,
      matrices: matricesOf(info, gpu.features),
      software: info.architecture === 'software' || isSoftware(this.adapter.name),
      maxBindingBytes: Math.min(gpu.limits.maxStorageBufferBindingSize, options.maxBindingBytes ?? Infinity),
      maxBufferBytes: gpu.limits.maxBufferSize,
      offsetAlignment: Math.max(
        gpu.limits.minStorageBufferOffsetAlignment,
        gpu.limits.minUniformBufferOffsetAlignment,
        16,
      ),
    };
    this.pipelines = new PipelineCache(gpu);
    this.lost = gpu.lost.then((loss) => {
      this.#failure = `device lost: ${loss.message || loss.reason}`;
      return this.#failure;
    });
    gpu.addEventListener('uncapturederror', (event) => {
      const { message } = (event as GPUUncapturedErrorEvent).error;
      this.#failure ??= message;
      for (const wait of this.#waits) wait.failure ??= message;
    });
  }

  /** Opens the best adapter, or the named one, with all its limits. ERR_NO_ADAPTER. */
  static async open(options: DeviceOptions = {}): Promise<Device> {
    const instance = createInstance(options);
    const adapter = await requestAdapter(instance, options);
    const wanted: GPUFeatureName[] = ['subgroups', 'timestamp-query', 'shader-f16', MATRIX_FEATURE];
    const requiredLimits: Record<string, number> = {};
    for (const name of [
      'maxStorageBufferBindingSize',
      'maxBufferSize',
      'maxComputeWorkgroupStorageSize',
      'maxComputeInvocationsPerWorkgroup',
      'maxStorageBuffersPerShaderStage',
    ] as const)
      if (!options.defaultLimits) requiredLimits[name] = adapter.limits[name];
    const gpu = await adapter.requestDevice({
      requiredFeatures: wanted.filter((feature) => adapter.features.has(feature)),
      requiredLimits,
    });
    return new Device(instance, adapter, gpu, options);
  }

  /** Throws what the driver reported since the last call outside any error scope, once: ERR_DEVICE_LOST or ERR_GPU. */
  check(): void {
    const failure = this.#failure;
    if (failure === undefined) return;
    if (failure.startsWith('device lost')) throw new UnetdError('ERR_DEVICE_LOST', `The GPU ${failure}`);
    this.#failure = undefined;
    throw new UnetdError('ERR_GPU', `The GPU driver reported: ${failure}`);
  }

  /**
   * Runs `work` inside error scopes; a reported error becomes ERR_GPU or ERR_OUT_OF_MEMORY naming `what`. Scopes are a stack
   * of the whole device, so `work` must not await: another task's calls would fall into its scopes.
   */
  async guarded<T>(what: string, work: () => T): Promise<T> {
    const scopes = ['out-of-memory', 'validation', 'internal'] as const;
    for (const scope of scopes) this.gpu.pushErrorScope(scope);
    let popped: { scope: string; error: Promise<GPUError | null> }[];
    let result: T;
    try {
      result = work();
    } finally {
      popped = [...scopes].reverse().map((scope) => ({ scope, error: this.gpu.popErrorScope() }));
    }
    for (const { scope, error } of popped.reverse()) {
      // Of a device that is lost no scope can be asked any more.
      const reported = await error.catch(() => this.check());
      if (!reported) continue;
      if (scope === 'out-of-memory')
        throw new UnetdError('ERR_OUT_OF_MEMORY', `${what}: the GPU is out of memory (${reported.message})`);
      throw new UnetdError('ERR_GPU', `${what}: ${reported.message}`);
    }
    return result;
  }

  /** A buffer of at least `sizeBytes` (rounded up to 16), zero filled. */
  createBuffer(label: string, sizeBytes: number, usage: number): GPUBuffer {
    const size = Math.max(16, Math.ceil(sizeBytes / 16) * 16);
    if (size > this.capabilities.maxBufferBytes)
      throw new UnetdError(
        'ERR_OUT_OF_MEMORY',
        `${label}: ${size} bytes are needed in one buffer, the adapter allows ${this.capabilities.maxBufferBytes}`,
        { needed: size, limit: this.capabilities.maxBufferBytes },
      );
    return this.gpu.createBuffer({ label, size, usage });
  }

  /**
   * Waits for submitted work. What the driver reports meanwhile outside any error scope is thrown by all that wait: ERR_DEVICE_LOST,
   * ERR_GPU.
   */
  async settle(work: () => Promise<unknown>): Promise<void> {
    const wait: Wait = { failure: undefined };
    this.#waits.add(wait);
    if (this.capabilities.software) this.#slowDown();
    try {
      await Promise.race([work(), this.lost]);
    } finally {
      this.#waits.delete(wait);
    }
    this.#failure ??= wait.failure;
    this.check();
  }

  /**
   * The bindings spin on `setImmediate` while a promise is pending. On a software adapter the core this takes is the GPU's own
   * (a forward took 1.9 times as long), so there each turn of the event loop is made to last while anything is waited for.
   */
  #slowDown(): void {
    if (this.#isSlowed) return;
    this.#isSlowed = true;
    let turns = 0;
    const slow = (): void => {
      this.#isSlowed = this.#waits.size > 0;
      if (!this.#isSlowed) return;
      // Short work is waited for at full speed.
      if (++turns > QUICK_TURNS) Atomics.wait(NEVER_WOKEN, 0, 0, TURN_MS);
      setImmediate(slow);
    };
    setImmediate(slow);
  }

  /** Copies bytes of a buffer (COPY_SRC) to the CPU; for tests and small results outside plans. */
  async read(buffer: GPUBuffer, offset: number, sizeBytes: number): Promise<Uint8Array> {
    const staging = this.createBuffer('read', sizeBytes, Usage.MAP_READ | Usage.COPY_DST);
    const encoder = this.gpu.createCommandEncoder();
    encoder.copyBufferToBuffer(buffer, offset, staging, 0, Math.ceil(sizeBytes / 4) * 4);
    this.gpu.queue.submit([encoder.finish()]);
    try {
      return await this.readMapped(staging, sizeBytes);
    } finally {
      staging.destroy();
    }
  }

  /** Maps a MAP_READ buffer, copies its first bytes and unmaps it again. */
  async readMapped(staging: GPUBuffer, sizeBytes: number): Promise<Uint8Array> {
    try {
      await this.settle(() => staging.mapAsync(MapMode.READ));
      return new Uint8Array(staging.getMappedRange().slice(0, sizeBytes));
    } finally {
      // Also where another's error ended the wait: a buffer that stays mapped is of no use to the next.
      staging.unmap();
    }
  }

  close(): void {
    this.gpu.destroy();
    void this.#instance;
  }
}
