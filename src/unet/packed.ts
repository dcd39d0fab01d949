/**
 * How large the weights of a UNet are on the GPU, and which dtypes of a file can be put there. Arithmetic on the config;
 * `weights.ts` does the loading.
 */
import { UnetdError } from '../errors.ts';
import { alignTo, ceilDiv, type Storage, storageBytes } from '../gpu/kernel.ts';
import { PANEL } from '../kernels/gemm.ts';
import { PACK_DTYPES } from '../kernels/pack.ts';
import type { TensorEntry } from '../safetensors.ts';
import type { UNetConfig } from './config.ts';
import { storedChannels } from './draft.ts';
import { type Part, partsOf, tensorsOf } from './layers.ts';

/** Linear layers and convolutions; norms are vectors. */
export const isMatrix = (part: Part): boolean => part.kind === 'linear' || part.kind === 'conv';

/** Bytes of the packed matrix of a part, padding included. */
export function matrixBytes(part: Part, storage: Storage): number {
  if (!isMatrix(part)) return 0;
  const k = part.kernel ** 2 * storedChannels(part.inFeatures);
  return ceilDiv(part.outFeatures, PANEL) * PANEL * k * storageBytes(storage);
}

/** Names of the vectors of a part: a norm's weight, and every bias. */
export function vectorNames(part: Part): readonly string[] {
  return [...(isMatrix(part) ? [] : [`${part.id}.weight`]), ...(part.bias ? [`${part.id}.bias`] : [])];
}

/** Bytes of one vector in f32, each at an offset that can be bound. */
export const vectorBytes = (part: Part, alignment: number): number =>
  alignTo(storedChannels(part.outFeatures) * 4, alignment);

/** GPU bytes that the weights of a UNet take, padding included. */
export function weightBytes(config: UNetConfig, storage: Storage, alignment: number): number {
  return partsOf(config).reduce(
    (sum, part) => sum + matrixBytes(part, storage) + vectorNames(part).length * vectorBytes(part, alignment),
    0,
  );
}

/** ERR_MODEL_INVALID where the file holds a tensor of the UNet in a dtype that cannot be packed. */
export function checkDtypes(config: UNetConfig, entryOf: (ldmName: string) => TensorEntry): void {
  const wrong = [...tensorsOf(config).keys()].map(entryOf).filter(({ dtype }) => !(dtype in PACK_DTYPES));
  const [first] = wrong;
  if (!first) return;
  const more = wrong.length > 1 ? ` (and ${wrong.length - 1} more tensors like it)` : '';
  throw new UnetdError(
    'ERR_MODEL_INVALID',
    `Tensor ${first.name} has dtype ${first.dtype}${more}; weights are taken as ${Object.keys(PACK_DTYPES).join(', ')}: convert the file to F16`,
    { tensor: first.name, dtype: first.dtype, count: wrong.length },
  );
}
