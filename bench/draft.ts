/**
 * The dispatches of a forward as the engine plans them, for counting: their arithmetic, and the bytes that they cannot help
 * moving. No weights, no GPU.
 */
import type { Capabilities, Dispatch, Resident, Storage } from '../src/gpu/kernel.ts';
import { plainDispatchesOf } from '../src/gpu/spec.ts';
import type { UNetConfig } from '../src/unet/config.ts';
import { layersOf, partsOf } from '../src/unet/layers.ts';
import { heldBundles } from '../src/unet/packed.ts';
import { planUNet, type UNetPlan, type UNetShape } from '../src/unet/plan.ts';

/** Of no adapter in particular. */
const ANY: Capabilities = {
  subgroupSize: 0,
  matrices: [],
  software: false,
  maxBindingBytes: 2 ** 27,
  maxBufferBytes: 2 ** 28,
  offsetAlignment: 256,
};

const unbound = (sizeBytes: number): Resident => ({
  kind: 'resident',
  label: 'unbound',
  current: () => {
    throw new Error('this plan is only counted');
  },
  offset: 0,
  sizeBytes,
});

export function drafted(
  config: UNetConfig,
  shape: UNetShape,
  storage: Storage = 'f16',
  capabilities: Capabilities = ANY,
): UNetPlan {
  const parts = new Map(partsOf(config).map((part) => [part.id, part]));
  const bundles = heldBundles(config, storage, capabilities);
  const slots = new Map(layersOf(config).map(({ id }, slot) => [id, slot]));
  const weights = {
    matrix: (id: string) => {
      const { inFeatures, outFeatures, kernel } = parts.get(id)!;
      const range = (_offset: number, sizeBytes: number): Resident => unbound(sizeBytes);
      return { slot: slots.get(id)!, format: storage, inFeatures, outFeatures, kernel, range };
    },
    vector: (name: string) => {
      const part = parts.get(name.replace(/\.(weight|bias)$/, ''))!;
      return name.endsWith('.bias') && !part.bias ? undefined : unbound(0);
    },
    bundle: (id: string) => {
      const members = bundles.find((bundle) => bundle.id === id)?.parts;
      if (!members) return undefined;
      const { inFeatures, kernel, bias } = members[0]!;
      const outFeatures = members.reduce((sum, part) => sum + part.outFeatures, 0);
      const range = (_offset: number, sizeBytes: number): Resident => unbound(sizeBytes);
      const matrix = { slot: -1, format: storage, inFeatures, outFeatures, kernel, range };
      return { matrix, bias: bias ? unbound(0) : undefined };
    },
  };
  const lora = (slot: number) => ({ slot, pool: unbound(0), table: unbound(0), t: unbound(0) });
  return planUNet(config, shape, { storage, capabilities, weights, lora });
}

/** What a forward without LoRAs runs, in order. */
export const baseDispatches = ({ spec }: UNetPlan): readonly Dispatch[] =>
  spec.steps.flatMap(plainDispatchesOf);

/** Each operand once; norm parameters and biases, which are small, are not counted. */
export const leastBytes = ({ operands }: Dispatch): number =>
  Object.values(operands).reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);

/** Kernels as people speak of them; a GEMM by where its rows come from. */
export function familyOf({ kernel, choices }: Dispatch): string {
  if (kernel.name !== 'gemm') return kernel.name.replace(/^group_.*/, 'group_norm').replaceAll('_', ' ');
  return choices.a === 'conv3' ? 'conv 3x3' : 'gemm';
}
