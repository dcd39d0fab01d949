/**
 * Two measurements beside the pictures: how far the server is from PyTorch, and what a LoRA stack costs per forward.
 * Sends forwards on a given connection and returns numbers; judges and prints nothing.
 */
import { type Client, type ClientTensor, floatsOf, tensorFrom } from '../src/client.ts';
import type { LoraUse } from '../src/engine/types.ts';
import type { SafetensorsView } from '../src/safetensors.ts';
import { named } from './prompts.ts';
import { gaussian } from './sampler.ts';
import { MODEL, PICTURE_SHAPE, stackLabel } from './workflows.ts';

export interface Deviation {
  readonly label: string;
  /** Root mean square of the difference over that of PyTorch's output. */
  readonly relative: number;
  readonly worst: number;
}

/**
 * Compares the server with `reference.safetensors`: PyTorch, float32, LoRAs merged into the weights. All forwards are
 * sent at once, so they run in one batch with a different stack in each request.
 */
export async function deviations(client: Client, reference: SafetensorsView): Promise<readonly Deviation[]> {
  const inputs = {
    x: named(reference, 'x'),
    timesteps: named(reference, 'timesteps'),
    context: named(reference, 'context'),
  };
  const names = [...reference.tensors.keys()].filter((name) => name === 'out' || name.startsWith('out.'));
  return Promise.all(
    names.sort().map(async (name) => {
      const loras = referenceStack(name, reference);
      const { out } = await client.forward({ model: MODEL, loras, ...inputs });
      return { label: stackLabel(loras), ...difference(out, named(reference, name)) };
    }),
  );
}

/** `out` has no LoRA, `out.NAME` that one at 1, `out.stack` what the file's metadata says, as `ink:0.7,neon:-0.3`. */
function referenceStack(name: string, reference: SafetensorsView): readonly LoraUse[] {
  if (name === 'out') return [];
  const text = name === 'out.stack' ? reference.metadata.get('stack')! : `${name.slice(4)}:1`;
  return text.split(',').map((part) => {
    const [lora, strength] = part.split(':');
    return { lora: `${lora}.safetensors`, strength: Number(strength) };
  });
}

function difference(got: ClientTensor, want: ClientTensor): Omit<Deviation, 'label'> {
  const a = floatsOf(got);
  const b = floatsOf(want);
  if (a.length !== b.length) throw new Error(`expected ${b.length} values, got ${a.length}`);
  let error = 0;
  let power = 0;
  let worst = 0;
  for (let i = 0; i < b.length; i++) {
    error += (a[i]! - b[i]!) ** 2;
    power += b[i]! ** 2;
    // Written so that a NaN shows.
    if (!(Math.abs(a[i]! - b[i]!) <= worst)) worst = Math.abs(a[i]! - b[i]!);
  }
  return { relative: Math.sqrt(error / power), worst };
}

export interface Cost {
  readonly label: string;
  /** Median GPU time of a forward. */
  readonly gpuMs: number;
  /** gpuMs over that of the first stack. */
  readonly ratio: number;
}

/** Median GPU time per forward of `rows` images for each stack, taken in turns so that drift hits all alike. */
export async function loraCosts(
  client: Client,
  stacks: readonly (readonly LoraUse[])[],
  context: ClientTensor,
  rounds: number,
): Promise<readonly Cost[]> {
  const rows = context.shape[0]!;
  const shape = [rows, ...PICTURE_SHAPE];
  const x = tensorFrom(
    gaussian(
      shape.reduce((product, size) => product * size, 1),
      1,
    ),
    shape,
  );
  const timesteps = tensorFrom(new Float32Array(rows).fill(500), [rows]);
  const times = stacks.map((): number[] => []);
  for (let round = 0; round <= rounds; round++) {
    for (const [index, loras] of stacks.entries()) {
      const { timing } = await client.forward({ model: MODEL, loras, x, timesteps, context });
      // The first round compiles, plans and uploads.
      if (round > 0) times[index]!.push(timing.gpuMs);
    }
  }
  const medians = times.map(median);
  return stacks.map((loras, index) => ({
    label: stackLabel(loras),
    gpuMs: medians[index]!,
    ratio: medians[index]! / medians[0]!,
  }));
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
