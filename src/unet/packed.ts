/**
 * How large the weights of a UNet are on the GPU, and which dtypes of a file can be put there. Arithmetic on the config;
 * `weights.ts` does the loading.
 */
import { UnetdError } from '../errors.ts';
import { alignTo, type Capabilities, ceilDiv } from '../gpu/kernel.ts';
import { PACK_DTYPES } from '../kernels/pack.ts';
import { formatOf, PANEL, panelBytes, storageOf, type WeightFormat } from '../kernels/panel.ts';
import type { TensorEntry } from '../safetensors.ts';
import type { UNetConfig } from './config.ts';
import { type Bundle, bundlesOf, type Part, partsOf, tensorsOf } from './layers.ts';
import { storedChannels } from './tensors.ts';

/** Linear layers and convolutions; norms are vectors. */
export const isMatrix = (part: Part): boolean => part.kind === 'linear' || part.kind === 'conv';

/**
 * Layers that the residual stream itself passes: an error there reaches all that comes behind, so q8_0 leaves them as they are
 * in f16. A forward of SD 1.5 is off by half as much for a tenth more bytes, one of SDXL for a fiftieth.
 */
const ON_STREAM: RegExp = /\.(skip_connection|proj_in|proj_out|op|conv)$|^out\./;

/** How a matrix is stored, and its bytes, padding included. */
export interface MatrixPlace {
  readonly format: WeightFormat;
  readonly panels: number;
  readonly panelBytes: number;
  readonly sizeBytes: number;
}

/** Of a model stored as `format`. */
export function placeOf(part: Part, format: WeightFormat): MatrixPlace {
  const k = part.kernel ** 2 * storedChannels(part.inFeatures);
  const own = ON_STREAM.test(part.id) ? storageOf(format) : formatOf(k, format);
  const panels = ceilDiv(part.outFeatures, PANEL);
  const bytes = panelBytes(k, own);
  return { format: own, panels, panelBytes: bytes, sizeBytes: panels * bytes };
}

/** Names of the vectors of a part: a norm's weight, and every bias. */
function vectorNames(part: Part): readonly string[] {
  return [...(isMatrix(part) ? [] : [`${part.id}.weight`]), ...(part.bias ? [`${part.id}.bias`] : [])];
}

/** Bytes of one vector in f32, each at an offset that can be bound. */
const vectorBytes = (part: Part, alignment: number): number =>
  alignTo(storedChannels(part.outFeatures) * 4, alignment);

/** The bundles whose weights lie side by side in one buffer, each where a binding may start. */
export const heldBundles = (
  config: UNetConfig,
  format: WeightFormat,
  { maxBufferBytes, offsetAlignment }: Capabilities,
): readonly Bundle[] =>
  bundlesOf(config, PANEL).filter(({ parts }) => {
    const sizes = parts.map((part) => placeOf(part, format).sizeBytes);
    const total = sizes.reduce((sum, bytes) => sum + bytes, 0);
    return total <= maxBufferBytes && sizes.every((bytes) => bytes % offsetAlignment === 0);
  });

/** Bytes of the biases of a bundle one behind the other, beside those of its layers. 0 where they have none. */
const bundleBiasBytes = ({ parts }: Bundle, alignment: number): number =>
  parts[0]!.bias
    ? alignTo(
        parts.reduce((sum, { outFeatures }) => sum + outFeatures * 4, 0),
        alignment,
      )
    : 0;

interface VectorPlace {
  readonly offset: number;
  readonly sizeBytes: number;
}

/** Biases and norm parameters in the one buffer of all, and once more the biases of each bundle without gaps. */
export interface VectorPlaces {
  readonly vectors: readonly (VectorPlace & { readonly name: string })[];
  readonly biases: readonly (VectorPlace & { readonly bundle: Bundle })[];
  readonly totalBytes: number;
}

export function vectorPlaces(
  parts: readonly Part[],
  held: readonly Bundle[],
  alignment: number,
): VectorPlaces {
  let totalBytes = 0;
  const take = (bytes: number): number => {
    totalBytes += bytes;
    return totalBytes - bytes;
  };
  const vectors = parts.flatMap((part) =>
    vectorNames(part).map((name) => ({
      name,
      offset: take(vectorBytes(part, alignment)),
      sizeBytes: storedChannels(part.outFeatures) * 4,
    })),
  );
  const biases = held.flatMap((bundle) => {
    const sizeBytes = bundleBiasBytes(bundle, alignment);
    return sizeBytes > 0 ? [{ bundle, offset: take(sizeBytes), sizeBytes }] : [];
  });
  return { vectors, biases, totalBytes };
}

/** GPU bytes that the weights of a UNet take, padding included. */
export function weightBytes(config: UNetConfig, format: WeightFormat, capabilities: Capabilities): number {
  const parts = partsOf(config);
  const held = heldBundles(config, format, capabilities);
  return parts
    .filter(isMatrix)
    .reduce(
      (sum, part) => sum + placeOf(part, format).sizeBytes,
      vectorPlaces(parts, held, capabilities.offsetAlignment).totalBytes,
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
