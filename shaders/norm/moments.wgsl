// Per-channel mean and sum of squared deviations over a chunk of tokens, the first step of a group norm:
//   mean[image, chunk, c] = sum_t x[image, t, c] / tokens of the chunk
//   m2[image, chunk, c]   = sum_t (x[image, t, c] - mean)^2
// x is two tensors side by side: 4*split channels of x, the rest of x2 (absent: split = quads). An invocation owns one
// quad of channels and one chunk and reads it once. moments [image][chunk][2][quads] in f32.

// Tokens of a turn: loads in flight, and on software drivers fewer turns, each of which masks all that it carries.
const TURN = 8u;

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
  // Summed as distances from the first token. A large common offset costs no digits, and as the origin is one of the n
  // values, even an outlier costs no more than a factor n of the roundoff (Chan, Golub, LeVeque 1983).
  let origin = at(image, first, quad);
  var sum = vec4f(0.0);
  var squares = vec4f(0.0);
  for (var t = first; t < last; t += TURN) {
    for (var i = 0u; i < TURN; i++) {
      let v = at(image, min(t + i, last - 1u), quad) - origin;
      let d = select(vec4f(0.0), v, t + i < last);
      sum += d;
      squares += d * d;
    }
  }
  let n = f32(last - first);
  let base = (image * p.chunks + chunk) * 2u * p.quads + quad;
  moments[base] = origin + sum / n;
  moments[base + p.quads] = max(squares - sum * sum / n, vec4f(0.0));
}
