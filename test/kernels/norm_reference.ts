/** Group norm, step by step, and layer norm in f64: the oracle of their cases. */

/** Mean and sum of squared deviations per [image][chunk][2][channel]; x [image, token, channel]. */
export function momentsOf(
  x: ArrayLike<number>,
  images: number,
  tokens: number,
  channels: number,
  chunkTokens: number,
): Float64Array {
  const chunks = Math.ceil(tokens / chunkTokens);
  const out = new Float64Array(images * chunks * 2 * channels);
  for (let image = 0; image < images; image++)
    for (let chunk = 0; chunk < chunks; chunk++)
      for (let c = 0; c < channels; c++) {
        const last = Math.min((chunk + 1) * chunkTokens, tokens);
        const first = chunk * chunkTokens;
        const at = (t: number): number => x[(image * tokens + t) * channels + c]!;
        let mean = 0;
        for (let t = first; t < last; t++) mean += at(t) / (last - first);
        let m2 = 0;
        for (let t = first; t < last; t++) m2 += (at(t) - mean) ** 2;
        const base = (image * chunks + chunk) * 2 * channels + c;
        out[base] = mean;
        out[base + channels] = m2;
      }
  return out;
}

export interface GroupSpec {
  readonly images: number;
  readonly tokens: number;
  readonly channels: number;
  readonly groups: number;
  readonly eps: number;
}

/** Scale and shift per [image][2][channel] from mean and variance of every (image, group), taken from x itself. */
export function affineOf(
  x: ArrayLike<number>,
  { images, tokens, channels, groups, eps }: GroupSpec,
  gamma: Float32Array,
  beta: Float32Array,
): Float64Array {
  const out = new Float64Array(images * 2 * channels);
  const wide = channels / groups;
  for (let image = 0; image < images; image++)
    for (let group = 0; group < groups; group++) {
      const values: number[] = [];
      for (let t = 0; t < tokens; t++)
        for (let c = group * wide; c < (group + 1) * wide; c++)
          values.push(x[(image * tokens + t) * channels + c]!);
      const mean = values.reduce((a, b) => a + b, 0) / values.length;
      const variance = values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length;
      for (let c = group * wide; c < (group + 1) * wide; c++) {
        const scale = gamma[c]! / Math.sqrt(variance + eps);
        out[image * 2 * channels + c] = scale;
        out[(image * 2 + 1) * channels + c] = beta[c]! - mean * scale;
      }
    }
  return out;
}

/** The same from moments [image][chunk][2][channel]. */
export function foldOf(
  moments: Float32Array,
  { images, tokens, channels, groups, eps }: GroupSpec,
  chunkTokens: number,
  gamma: Float32Array,
  beta: Float32Array,
): Float64Array {
  const chunks = Math.ceil(tokens / chunkTokens);
  const wide = channels / groups;
  const out = new Float64Array(images * 2 * channels);
  for (let at = 0; at < images * groups; at++) {
    const image = Math.floor(at / groups);
    const first = (at % groups) * wide;
    const parts: { n: number; mean: number; m2: number }[] = [];
    for (let chunk = 0; chunk < chunks; chunk++)
      for (let c = first; c < first + wide; c++) {
        const base = (image * chunks + chunk) * 2 * channels + c;
        const n = Math.min(chunkTokens, tokens - chunk * chunkTokens);
        parts.push({ n, mean: moments[base]!, m2: moments[base + channels]! });
      }
    const count = tokens * wide;
    const mean = parts.reduce((sum, part) => sum + part.n * part.mean, 0) / count;
    const m2 = parts.reduce((sum, part) => sum + part.m2 + part.n * (part.mean - mean) ** 2, 0);
    for (let c = first; c < first + wide; c++) {
      const scale = gamma[c]! / Math.sqrt(m2 / count + eps);
      out[image * 2 * channels + c] = scale;
      out[(image * 2 + 1) * channels + c] = beta[c]! - mean * scale;
    }
  }
  return out;
}

/** Layer norm of rows: x [rows, channels]. */
export function layerNormRows(
  x: Float32Array,
  channels: number,
  gamma: Float32Array,
  beta: Float32Array,
  eps: number,
): Float64Array {
  const out = new Float64Array(x.length);
  for (let base = 0; base < x.length; base += channels) {
    const row = Float64Array.from(x.subarray(base, base + channels));
    const mean = row.reduce((a, b) => a + b, 0) / channels;
    const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / channels;
    row.forEach((v, c) => {
      out[base + c] = ((v - mean) / Math.sqrt(variance + eps)) * gamma[c]! + beta[c]!;
    });
  }
  return out;
}
