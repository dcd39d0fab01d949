// Second step of a group norm: the moments of all chunks and channels of a group become one mean and variance, and
// those, with gamma and beta, one scale and shift per channel: y = x * affine[0][c] + affine[1][c].
// Parallel variance: M2 = sum_i m2_i + n_i (mean_i - mean)^2 (Chan, Golub, LeVeque 1979).
// An invocation owns one (image, group). moments as in moments.wgsl; affine [image][2][channels] in f32.
// Precondition: channels = groups * groupChannels.

fn momentAt(image: u32, chunk: u32, which: u32, channel: u32) -> f32 {
  return moments[((image * p.chunks + chunk) * 2u + which) * p.channels + channel];
}

fn tokensOf(chunk: u32) -> f32 {
  return f32(min((chunk + 1u) * p.chunkTokens, p.tokens) - chunk * p.chunkTokens);
}

@compute @workgroup_size(32)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let group = id.x;
  if (group >= p.groups) { return; }
  let image = p.image0 + id.y;
  let first = group * p.groupChannels;
  // Summed as distances from the first mean: a large common offset costs no digits.
  let origin = momentAt(image, 0u, 0u, first);
  var sum = 0.0;
  for (var chunk = 0u; chunk < p.chunks; chunk++) {
    for (var c = first; c < first + p.groupChannels; c++) {
      sum += (momentAt(image, chunk, 0u, c) - origin) * tokensOf(chunk);
    }
  }
  let count = f32(p.tokens) * f32(p.groupChannels);
  let mean = origin + sum / count;
  var m2 = 0.0;
  for (var chunk = 0u; chunk < p.chunks; chunk++) {
    for (var c = first; c < first + p.groupChannels; c++) {
      let d = momentAt(image, chunk, 0u, c) - mean;
      m2 += momentAt(image, chunk, 1u, c) + tokensOf(chunk) * d * d;
    }
  }
  let rstd = inverseSqrt(m2 / count + p.eps);
  for (var c = first; c < first + p.groupChannels; c++) {
    let scale = rstd * gamma[c];
    affine[image * 2u * p.channels + c] = scale;
    affine[(image * 2u + 1u) * p.channels + c] = beta[c] - mean * scale;
  }
}
