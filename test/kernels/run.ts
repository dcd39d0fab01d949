/**
 * Runs a case on a device: uploads inputs, fills the rest of every tensor with guard words, replays the dispatches as a
 * plan inside error scopes, reads everything back. Comparing is left to the caller.
 */
import { Arena } from '../../src/gpu/arena.ts';
import { type Device, Usage } from '../../src/gpu/device.ts';
import type { Operand, Resident, Storage, Virtual } from '../../src/gpu/kernel.ts';
import { Plan } from '../../src/gpu/plan.ts';
import { type Built, bytesOf, decoded, encoded, type Format } from './case.ts';

/**
 * NaNs as one f32 and as two f16: what is read past an input, or never written of an output, shows up as NaN. Two of
 * them, since arithmetic keeps a NaN's bits: what is read past an input and written past an output is no output's guard.
 * Bindings reach over the guard, or the driver's bounds clamping would hide such accesses.
 */
const INPUT_GUARD = 0xffc5ffc5;
const OUTPUT_GUARD = 0xffd3ffd3;
const GUARD_BYTES = 256;

export interface Ran {
  /** Output values by name, decoded. */
  readonly outputs: Readonly<Record<string, Float32Array>>;
  /** Names of tensors whose guard, or whose input bytes, changed. */
  readonly damaged: readonly string[];
}

/** A case's dispatches as a plan, with its inputs in place. Close `plan`, `arena` and `residents` after use. */
export interface Prepared {
  readonly plan: Plan;
  readonly arena: Arena;
  readonly tensors: ReadonlyMap<string, { readonly virtual: Virtual; readonly image: Uint8Array }>;
  readonly residents: readonly GPUBuffer[];
}

function guarded(bytes: Uint8Array, sizeBytes: number, word: number): Uint8Array {
  const image = new Uint8Array(Math.ceil(sizeBytes / 4) * 4 + GUARD_BYTES);
  new Uint32Array(image.buffer).fill(word);
  image.set(bytes);
  return image;
}

export function closePrepared({ plan, arena, residents }: Prepared): void {
  plan.close();
  arena.close();
  for (const buffer of residents) buffer.destroy();
}

export async function prepare(
  device: Device,
  built: Built,
  storage: Storage,
  variant: string | undefined,
): Promise<Prepared> {
  const tensors = new Map<string, { virtual: Virtual; image: Uint8Array }>();
  const operands: Record<string, Operand> = {};
  const residents: GPUBuffer[] = [];
  const add = (name: string, image: Uint8Array, as: Format | 'words' | 'bytes'): void => {
    const virtual: Virtual = {
      kind: 'virtual',
      id: tensors.size,
      label: name,
      sizeBytes: image.length,
      wide: as === 'wide',
    };
    tensors.set(name, { virtual, image });
    operands[name] = virtual;
  };
  for (const [name, input] of Object.entries(built.inputs)) {
    const bytes =
      input.as === 'words'
        ? new Uint8Array(input.values.buffer, input.values.byteOffset, input.values.byteLength)
        : encoded(input.values, input.as, storage);
    const image = guarded(bytes, bytes.length, INPUT_GUARD);
    if (!input.resident) {
      add(name, image, input.as);
      continue;
    }
    const buffer = device.createBuffer(name, image.length, Usage.STORAGE | Usage.COPY_DST | Usage.COPY_SRC);
    device.gpu.queue.writeBuffer(buffer, 0, image);
    residents.push(buffer);
    operands[name] = {
      kind: 'resident',
      label: name,
      current: () => buffer,
      offset: 0,
      sizeBytes: 0,
    } satisfies Resident;
  }
  for (const [name, output] of Object.entries(built.outputs))
    add(name, guarded(new Uint8Array(), output.count * bytesOf(output.as, storage), OUTPUT_GUARD), output.as);
  const virtuals = [...tensors.values()].map((tensor) => tensor.virtual);
  const arena = new Arena(device, 'case arena');
  const plan = await Plan.compile(device, arena, {
    label: 'case',
    storage,
    steps: built
      .dispatches(operands, device.capabilities, variant)
      .map((dispatch) => ({ kind: 'always' as const, dispatch })),
    feeds: virtuals,
    results: virtuals,
  });
  await arena.ensure(plan.arenaBytes);
  for (const { virtual, image } of tensors.values()) plan.write(virtual, image);
  return { plan, arena, tensors, residents };
}

export async function runCase(
  device: Device,
  built: Built,
  storage: Storage,
  variant: string | undefined,
): Promise<Ran> {
  const prepared = await prepare(device, built, storage, variant);
  const { plan, arena, tensors } = prepared;
  try {
    const bytes = await device.guarded('case', async () => {
      const encoder = device.gpu.createCommandEncoder();
      plan.encode(encoder);
      device.gpu.queue.submit([encoder.finish()]);
      return await device.read(arena.buffer, 0, plan.arenaBytes);
    });
    device.check();
    const outputs: Record<string, Float32Array> = {};
    const damaged: string[] = [];
    for (const [name, { virtual, image }] of tensors) {
      const at = plan.offsetOf(virtual);
      const after = bytes.subarray(at, at + image.length);
      const output = built.outputs[name];
      const size = output ? output.count * bytesOf(output.as, storage) : 0;
      if (output) outputs[name] = decoded(after.slice(0, size), output.as, storage);
      if (Buffer.compare(after.subarray(size), image.subarray(size)) !== 0) damaged.push(name);
    }
    return { outputs, damaged };
  } finally {
    closePrepared(prepared);
  }
}
