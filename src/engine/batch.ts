/**
 * Requests to one batch and back: rows of all requests side by side in the storage dtype, results cut up again. Pure;
 * the requests have been checked (`check.ts`).
 */
import type { Storage } from '../gpu/kernel.ts';
import { fromF32, toF32 } from '../half.ts';
import type { UNetConfig } from '../unet/config.ts';
import { type ControlPattern, timestepEmbedding, type UNetShape } from '../unet/plan.ts';
import { storedChannels } from '../unet/tensors.ts';
import { CONTROL_LISTS, imagesIn } from './check.ts';
import type { StepRequest, TensorData } from './types.ts';

/** The shape that all requests of a batch share, with the images of all together. */
export function shapeOf(requests: readonly StepRequest[]): UNetShape {
  const [first] = requests;
  if (!first) throw new Error('a batch needs a request');
  const control: { [list in (typeof CONTROL_LISTS)[number]]?: readonly boolean[] } = {};
  for (const list of CONTROL_LISTS) {
    const entries = first.control?.[list];
    if (entries) control[list] = entries.map((entry) => entry !== null);
  }
  return {
    images: imagesIn(requests),
    height: first.x.shape[2] ?? 0,
    width: first.x.shape[3] ?? 0,
    contextTokens: first.context.shape[1] ?? 0,
    control: control satisfies ControlPattern,
  };
}

/** A feed's bytes by name: `x`, `time`, `context`, `y`, `control.LIST.I`. */
export function feedsOf(
  config: UNetConfig,
  storage: Storage,
  requests: readonly StepRequest[],
): ReadonlyMap<string, Uint8Array> {
  const feeds = new Map<string, Uint8Array>();
  const dtype = storage === 'f16' ? 'F16' : 'F32';
  const put = (name: string, tensors: readonly TensorData[], rowLength?: number): void => {
    feeds.set(name, concat(tensors.map((tensor) => stored(tensor, dtype, rowLength))));
  };
  put(
    'x',
    requests.map((r) => r.x),
  );
  put(
    'context',
    requests.map((r) => r.context),
    storedChannels(config.contextDim),
  );
  const ys = requests.flatMap((r) => (r.y ? [r.y] : []));
  if (config.admChannels !== null) put('y', ys, storedChannels(config.admChannels));
  const time = requests.map((r) =>
    fromF32(dtype, timestepEmbedding(toF32('F32', r.timesteps.data), config.modelChannels)),
  );
  feeds.set('time', concat(time));
  for (const list of CONTROL_LISTS)
    requests[0]?.control?.[list]?.forEach((entry, i) => {
      if (entry !== null)
        put(
          `control.${list}.${i}`,
          requests.map((r) => r.control![list]![i]!),
        );
    });
  return feeds;
}

/** The bytes of a tensor in the storage dtype; rows of the last dimension padded with zeros to `rowLength`. */
function stored(tensor: TensorData, dtype: 'F32' | 'F16', rowLength?: number): Uint8Array {
  const width = tensor.shape.at(-1) ?? 1;
  if (rowLength !== undefined && rowLength !== width) {
    const values = toF32(tensor.dtype, tensor.data);
    const padded = new Float32Array((values.length / width) * rowLength);
    for (let row = 0; row * width < values.length; row++)
      padded.set(values.subarray(row * width, (row + 1) * width), row * rowLength);
    return fromF32(dtype, padded);
  }
  return tensor.dtype === dtype ? tensor.data : fromF32(dtype, toF32(tensor.dtype, tensor.data));
}

/** The bytes one behind the other, in whole words as uploads need. */
function concat(parts: readonly Uint8Array[]): Uint8Array {
  const length = parts.reduce((sum, part) => sum + part.byteLength, 0);
  const all = new Uint8Array(Math.ceil(length / 4) * 4);
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.byteLength;
  }
  return all;
}

/** Cuts `out` (f32, all images) into one tensor per request, in its `x` dtype. */
export function outsOf(
  config: UNetConfig,
  requests: readonly StepRequest[],
  out: Uint8Array,
): readonly TensorData[] {
  let at = 0;
  return requests.map(({ x }) => {
    const [images = 0, , height = 0, width = 0] = x.shape;
    const shape = [images, config.outChannels, height, width];
    const sizeBytes = images * config.outChannels * height * width * 4;
    const bytes = out.slice(at, at + sizeBytes);
    at += sizeBytes;
    return { dtype: x.dtype, shape, data: x.dtype === 'F32' ? bytes : fromF32('F16', toF32('F32', bytes)) };
  });
}
