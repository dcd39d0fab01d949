/** Weights that are nowhere, of any config: for plans that are counted, compiled or recorded, but not run. */
import type { Capabilities, Resident, Storage } from '../../src/gpu/kernel.ts';
import type { UNetConfig } from '../../src/unet/config.ts';
import { layersOf, type Part, partsOf } from '../../src/unet/layers.ts';
import type { Matrix } from '../../src/unet/matmul.ts';
import { heldBundles } from '../../src/unet/packed.ts';
import { storedChannels, type WeightSource } from '../../src/unet/tensors.ts';

/** `matrix` and `vector` give what stands in for so many bytes of either. */
export function standInWeights(
  config: UNetConfig,
  storage: Storage,
  capabilities: Capabilities,
  { matrix, vector }: Readonly<Record<'matrix' | 'vector', (sizeBytes: number) => Resident>>,
): WeightSource {
  const parts = new Map(partsOf(config).map((part) => [part.id, part]));
  const bundles = new Map(
    heldBundles(config, storage, capabilities).map((bundle) => [bundle.id, bundle.parts]),
  );
  const slots = new Map(layersOf(config).map(({ id }, slot) => [id, slot]));
  const matrixOf = ({ inFeatures, kernel }: Part, outFeatures: number, slot: number): Matrix => ({
    slot,
    format: storage,
    inFeatures,
    outFeatures,
    kernel,
    range: (_offset, sizeBytes) => matrix(sizeBytes),
  });
  return {
    matrix: (id) => matrixOf(parts.get(id)!, parts.get(id)!.outFeatures, slots.get(id)!),
    vector: (name) => {
      const part = parts.get(name.replace(/\.(weight|bias)$/, ''))!;
      if (name.endsWith('.bias') && !part.bias) return undefined;
      return vector(storedChannels(part.outFeatures) * 4);
    },
    bundle: (id) => {
      const members = bundles.get(id);
      if (!members) return undefined;
      const outFeatures = members.reduce((sum, part) => sum + part.outFeatures, 0);
      const bias = members[0]!.bias ? vector(outFeatures * 4) : undefined;
      return { matrix: matrixOf(members[0]!, outFeatures, -1), bias };
    },
  };
}
