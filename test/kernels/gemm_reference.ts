/** The GEMM family in f64, written the naive way: the oracle of its cases. Nothing here is fast or runs on a GPU. */

/** Rows of A and where they come from; the logical twin of `Rows` in src/kernels/gemm.ts. */
export interface ConvShape {
  readonly srcHeight: number;
  readonly srcWidth: number;
  readonly inHeight: number;
  readonly inWidth: number;
  readonly stride: 1 | 2;
}

export const outSide = (inSide: number, stride: number): number => Math.floor((inSide - 1) / stride) + 1;

/** im2col of x [image, srcHeight, srcWidth, channel] for a 3x3 convolution with padding 1: [image, pixel, tap, channel]. */
export function unfold(x: Float32Array, images: number, channels: number, conv: ConvShape): Float64Array {
  const { srcHeight, srcWidth, inHeight, inWidth, stride } = conv;
  const outHeight = outSide(inHeight, stride);
  const outWidth = outSide(inWidth, stride);
  const out = new Float64Array(images * outHeight * outWidth * 9 * channels);
  let at = 0;
  for (let image = 0; image < images; image++)
    for (let oy = 0; oy < outHeight; oy++)
      for (let ox = 0; ox < outWidth; ox++)
        for (let tap = 0; tap < 9; tap++) {
          const y = oy * stride - 1 + Math.floor(tap / 3);
          const xx = ox * stride - 1 + (tap % 3);
          if (y >= 0 && xx >= 0 && y < inHeight && xx < inWidth) {
            // Nearest neighbour as torch.nn.functional.interpolate: floor(dst * src / dst size).
            const sy = Math.floor((y * srcHeight) / inHeight);
            const sx = Math.floor((xx * srcWidth) / inWidth);
            const from = ((image * srcHeight + sy) * srcWidth + sx) * channels;
            for (let c = 0; c < channels; c++) out[at + c] = x[from + c]!;
          }
          at += channels;
        }
  return out;
}

/** x [rows, split] and x2 [rows, channels - split] side by side. */
export function beside(
  x: Float32Array,
  x2: Float32Array,
  rows: number,
  channels: number,
  split: number,
): Float64Array {
  const out = new Float64Array(rows * channels);
  for (let r = 0; r < rows; r++) {
    out.set(x.subarray(r * split, (r + 1) * split), r * channels);
    out.set(x2.subarray(r * (channels - split), (r + 1) * (channels - split)), r * channels + split);
  }
  return out;
}

/** a [m, k] times w [n, k] transposed: [m, n]. */
export function product(
  a: ArrayLike<number>,
  w: ArrayLike<number>,
  m: number,
  n: number,
  k: number,
): Float64Array {
  const out = new Float64Array(m * n);
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) {
      let sum = 0;
      for (let c = 0; c < k; c++) sum += a[i * k + c]! * w[j * k + c]!;
      out[i * n + j] = sum;
    }
  return out;
}

/** w [n, k] -> panels [ceil(n / width)][k][width], zero padded: what `pack` makes. */
export function panelsOf(w: Float32Array, n: number, k: number, width: number): Float32Array {
  const panels = Math.ceil(n / width);
  const out = new Float32Array(panels * k * width);
  for (let j = 0; j < n; j++)
    for (let c = 0; c < k; c++) out[(Math.floor(j / width) * k + c) * width + (j % width)] = w[j * k + c]!;
  return out;
}

export const silu = (v: number): number => v / (1 + Math.exp(-v));

/** erf to f64 accuracy: its Maclaurin series below 3, a continued fraction of erfc above (both of DLMF chapter 7). */
function erf(v: number): number {
  const a = Math.abs(v);
  let result: number;
  if (a < 3) {
    let term = a;
    let sum = a;
    for (let n = 1; n < 80; n++) {
      term *= (-a * a) / n;
      sum += term / (2 * n + 1);
    }
    result = (2 / Math.sqrt(Math.PI)) * sum;
  } else {
    let fraction = a;
    for (let n = 60; n > 0; n--) fraction = a + n / 2 / fraction;
    result = 1 - Math.exp(-a * a) / (Math.sqrt(Math.PI) * fraction);
  }
  return v < 0 ? -result : result;
}

export const gelu = (v: number): number => v * 0.5 * (1 + erf(v * Math.SQRT1_2));
