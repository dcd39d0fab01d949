/** Latents and pictures as ComfyUI saves them, and how far two of them are apart. */
import { PNG } from 'pngjs';
import { toF32 } from '../../src/half.ts';
import { decode } from '../../src/safetensors.ts';

export interface Latent {
  /** [N, C, H, W] */
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

export interface Picture {
  readonly width: number;
  readonly height: number;
  /** RGBA. */
  readonly values: Uint8Array;
}

/** A file of the node SaveLatent. */
export function readLatent(bytes: Buffer): Latent {
  const found = decode(bytes).tensors.get('latent_tensor');
  if (found === undefined) throw new Error('The file holds no "latent_tensor".');
  return { shape: found.shape, values: toF32(found.dtype, found.data) };
}

export function readPicture(bytes: Buffer): Picture {
  const { width, height, data } = PNG.sync.read(bytes);
  return { width, height, values: data };
}

/** The largest difference as a share of the largest magnitude of `b`; infinite where `a` is not finite. */
export function latentDistance(a: Latent, b: Latent): number {
  if (String(a.shape) !== String(b.shape))
    throw new Error(`Latents [${a.shape}] and [${b.shape}] differ in shape.`);
  let [distance, largest] = [0, 0];
  for (const [index, value] of a.values.entries()) {
    if (!Number.isFinite(value)) return Number.POSITIVE_INFINITY;
    distance = Math.max(distance, Math.abs(value - b.values[index]!));
    largest = Math.max(largest, Math.abs(b.values[index]!));
  }
  return distance / largest;
}

/** The largest difference of a channel of a pixel, from 0 to 255. */
export function pictureDistance(a: Picture, b: Picture): number {
  if (a.width !== b.width || a.height !== b.height)
    throw new Error(`Pictures of ${a.width}x${a.height} and ${b.width}x${b.height} differ in size.`);
  return a.values.reduce((most, value, index) => Math.max(most, Math.abs(value - b.values[index]!)), 0);
}

/** Standard deviation of the colours, and the share of them that are 0 or 255. */
export function contrast({ values }: Picture): { readonly std: number; readonly saturated: number } {
  const colours = values.filter((_, index) => index % 4 !== 3);
  const mean = colours.reduce((sum, value) => sum + value, 0) / colours.length;
  const variance = colours.reduce((sum, value) => sum + (value - mean) ** 2, 0) / colours.length;
  const saturated = colours.filter((value) => value === 0 || value === 255).length;
  return { std: Math.sqrt(variance), saturated: saturated / colours.length };
}

/** A PNG with soft shapes, to take control from and to inpaint: a rectangle in it is transparent. */
export function hintPicture(width: number, height: number): Buffer {
  const png = new PNG({ width, height });
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const disc = Math.hypot(x - width / 3, y - height / 2) < width / 4 ? 200 : 40;
      const isHole = x > width / 2 && y > height / 2;
      const colour = [disc, (255 * x) / width, (255 * y) / height, isHole ? 0 : 255];
      png.data.set(colour, 4 * (y * width + x));
    }
  }
  return PNG.sync.write(png);
}
