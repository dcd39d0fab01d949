/**
 * The dispatches of a forward as the engine plans them, for counting their arithmetic and the bytes that they cannot help
 * moving, and for encoding them. No weights, no GPU.
 */
import type { Capabilities, Dispatch, Resident, Storage } from '../src/gpu/kernel.ts';
import { plainDispatchesOf } from '../src/gpu/spec.ts';
import type { UNetConfig } from '../src/unet/config.ts';
import { planUNet, type UNetPlan, type UNetShape } from '../src/unet/plan.ts';
import { GUARANTEED } from '../test/gpu/capabilities.ts';
import { standInWeights } from '../test/unet/stand-in.ts';

const unbound = (sizeBytes: number): Resident => ({
  kind: 'resident',
  label: 'unbound',
  current: () => {
    throw new Error('this plan is only counted');
  },
  offset: 0,
  sizeBytes,
});

/** `standIn`: what so many bytes of the weights are bound to. */
export function drafted(
  config: UNetConfig,
  shape: UNetShape,
  storage: Storage = 'f16',
  capabilities: Capabilities = GUARANTEED,
  standIn: (sizeBytes: number) => Resident = unbound,
): UNetPlan {
  // Norm parameters and biases, which are small, are not counted.
  const operands = { matrix: standIn, vector: () => standIn(0) };
  const weights = standInWeights(config, storage, capabilities, operands);
  const lora = (slot: number) => ({ slot, pool: standIn(0), table: standIn(0), t: standIn(0) });
  return planUNet(config, shape, { storage, capabilities, weights, lora });
}

/** What a forward without LoRAs runs, in order. */
export const baseDispatches = ({ spec }: UNetPlan): readonly Dispatch[] =>
  spec.steps.flatMap(plainDispatchesOf);

/** Each operand once. */
export const leastBytes = ({ operands }: Dispatch): number =>
  Object.values(operands).reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);

/** Kernels as people speak of them; a GEMM by where its rows come from. */
export function familyOf({ kernel, choices }: Dispatch): string {
  if (kernel.name !== 'gemm') return kernel.name.replace(/^group_.*/, 'group_norm').replaceAll('_', ' ');
  return choices.a === 'conv3' ? 'conv 3x3' : 'gemm';
}
