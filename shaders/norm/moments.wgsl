// Per-channel mean and sum of squared deviations over a chunk of tokens, the first step of a group norm:
//   mean[image, chunk, c] = sum_t x[image, t, c] / tokens of the chunk
//   m2[image, chunk, c]   = sum_t (x[image, t, c] - mean)^2
// x is two tensors side by side: 4*split channels of x, the rest of x2 (absent: split = quads). An invocation owns one
// quad of channels and one chunk, in two passes, so nothing cancels. moments [image][chunk][2][quads] in f32.

fn at(image: u32, token: u32, quad: u32) -> vec4f {
  let row = image * p.tokens + token;
  if (HAS_x2 && quad >= p.split) { return load_x2(row * (p.quads - p.split) + quad - p.split); }
  return load_x(row * p.split + quad);
}

@compute @workgroup_size(16)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let quad = id.x;
  if (quad >= p.quads) { return; }
  let chunk = id.y;
  let image = id.z;
  let first = chunk * p.chunkTokens;
  let last = min(first + p.chunkTokens, p.tokens);
  // Summed as distances from the first token: a large common offset costs no digits.
  let origin = at(image, first, quad);
  var sum = vec4f(0.0);
  for (var t = first; t < last; t++) { sum += at(image, t, quad) - origin; }
  let mean = origin + sum / f32(last - first);
  var m2 = vec4f(0.0);
  for (var t = first; t < last; t++) {
    let d = at(image, t, quad) - mean;
    m2 += d * d;
  }
  let base = (image * p.chunks + chunk) * 2u * p.quads + quad;
  moments[base] = mean;
  moments[base + p.quads] = m2;
}
