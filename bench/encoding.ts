/**
 * What encoding a forward costs on the CPU. `encodingOf` encodes the plan that the engine runs, over weights that stand in, again
 * and again without submitting it, so it tells the steady state of a server; in turns with it, the calls of the bindings alone.
 * `submitting` times the submits of real work.
 */
import { setImmediate } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { globals } from 'webgpu';
import { Arena } from '../src/gpu/arena.ts';
import { type Device, Usage } from '../src/gpu/device.ts';
import type { Capabilities, Resident, Storage } from '../src/gpu/kernel.ts';
import { Plan } from '../src/gpu/plan.ts';
import type { UNetConfig } from '../src/unet/config.ts';
import type { UNetShape } from '../src/unet/plan.ts';
import { drafted } from './draft.ts';
import { median } from './measure.ts';

/**
 * Encodings that count, and before them those in which V8 compiles and optimises the code, and whose memory the others take
 * over: an encoding in fresh memory spends a fifth of its time in page faults.
 */
const ENCODES = 100;
const WARM_UP = 100;
/** More than the element of any binding; no bytes of it are ever read. */
const STAND_IN_BYTES = 4096;

/** Microseconds of processor time a dispatch, medians of many encodings. */
export interface Encoding {
  /** All that a plan does from the start of its compute pass to its end. */
  readonly us: number;
  /** The calls that it makes, and nothing between them. */
  readonly callsUs: number;
}

/** Frees what JavaScript has let go of, down to Dawn's command buffers. */
async function collectGarbage(): Promise<void> {
  setFlagsFromString('--expose-gc');
  runInNewContext('gc')();
  // The bindings' finalizers run as tasks of their own.
  await setImmediate();
}

interface Call {
  pipeline: GPUComputePipeline;
  bindGroup: GPUBindGroup;
  grid: readonly [number, number, number];
}

/** What a plan calls, dispatch by dispatch. */
function callsOf(plan: Plan): readonly Call[] {
  const calls: Call[] = [];
  let call: Partial<Call> = {};
  const pass = {
    setPipeline: (pipeline: GPUComputePipeline) => {
      call.pipeline = pipeline;
    },
    setBindGroup: (_: number, bindGroup: GPUBindGroup) => {
      call.bindGroup = bindGroup;
    },
    dispatchWorkgroups: (...grid: readonly [number, number, number]) => {
      calls.push({ ...call, grid } as Call);
      call = {};
    },
    end: () => {},
  };
  plan.encode({ beginComputePass: () => pass } as unknown as GPUCommandEncoder);
  return calls;
}

function encodeCalls(encoder: GPUCommandEncoder, calls: readonly Call[]): void {
  const pass = encoder.beginComputePass();
  for (const { pipeline, bindGroup, grid } of calls) {
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, bindGroup);
    pass.dispatchWorkgroups(grid[0], grid[1], grid[2]);
  }
  pass.end();
}

/** The process does nothing else meanwhile. */
export async function encodingOf(
  device: Device,
  config: UNetConfig,
  shape: UNetShape,
  storage: Storage,
  capabilities: Capabilities,
): Promise<Encoding> {
  const buffer = device.createBuffer('stand-in', STAND_IN_BYTES, Usage.STORAGE);
  const standIn: Resident = {
    ...{ kind: 'resident', label: 'stand-in', offset: 0, sizeBytes: 0 },
    current: () => buffer,
  };
  const arena = new Arena(device, 'encoding');
  const { spec } = drafted(config, shape, storage, capabilities, () => standIn);
  const plan = await Plan.compile(device, arena, spec);
  try {
    await arena.ensure(plan.arenaBytes);
    const calls = callsOf(plan);
    const each = (encode: (encoder: GPUCommandEncoder) => void): number => {
      const encoder = device.gpu.createCommandEncoder();
      const before = process.cpuUsage();
      encode(encoder);
      const { user, system } = process.cpuUsage(before);
      encoder.finish();
      return (user + system) / calls.length;
    };
    const inTurns = (rounds: number): readonly Encoding[] =>
      Array.from({ length: rounds }, () => ({
        us: each((encoder) => plan.encode(encoder)),
        callsUs: each((encoder) => encodeCalls(encoder, calls)),
      }));
    inTurns(WARM_UP);
    await collectGarbage();
    const rounds = inTurns(ENCODES);
    // Validation errors of an encoding arrive with the next wait.
    await device.settle(() => device.gpu.queue.onSubmittedWorkDone());
    return { us: median(rounds.map(({ us }) => us)), callsUs: median(rounds.map(({ callsUs }) => callsUs)) };
  } finally {
    plan.close();
    arena.close();
    buffer.destroy();
  }
}

interface Bindings {
  readonly GPUCommandEncoder: { readonly prototype: GPUCommandEncoder };
  readonly GPUQueue: { readonly prototype: GPUQueue };
}

const bindings = globals as unknown as Bindings;

/**
 * Milliseconds in `finish` and `submit`, where the driver may record its own commands, until `work` settles, and what it
 * gives. Timed at the bindings themselves, so one at a time.
 */
export async function submitting<T>(work: () => Promise<T>): Promise<readonly [ms: number, result: T]> {
  const encoder = bindings.GPUCommandEncoder.prototype;
  const queue = bindings.GPUQueue.prototype;
  const { finish } = encoder;
  const { submit } = queue;
  let ms = 0;
  const timed = <R>(call: () => R): R => {
    const begun = performance.now();
    try {
      return call();
    } finally {
      ms += performance.now() - begun;
    }
  };
  encoder.finish = function (this: GPUCommandEncoder, descriptor) {
    return timed(() => finish.call(this, descriptor));
  };
  queue.submit = function (this: GPUQueue, buffers) {
    return timed(() => submit.call(this, buffers));
  };
  try {
    const result = await work();
    return [ms, result];
  } finally {
    Object.assign(encoder, { finish });
    Object.assign(queue, { submit });
  }
}
