// Per-channel mean and sum of squared deviations over a chunk of tokens, the first step of a group norm:
//   mean[image, chunk, c] = sum_t x[image, t, c] / tokens of the chunk
//   m2[image, chunk, c]   = sum_t (x[image, t, c] - mean)^2
// x is two tensors side by side: 4*split channels of x, the rest of x2 (absent: split = quads). A workgroup owns LANES quads
// of channels and one chunk, and each of its ROWS rows every ROWS-th token; all is read once. moments
// [image][chunk][2][quads] in f32.

// Tokens of a turn: loads in flight, and on software drivers fewer turns, each of which masks all that it carries.
const TURN = 4u;

var<workgroup> sums: array<vec4f, LANES * ROWS>;
var<workgroup> squared: array<vec4f, LANES * ROWS>;

fn at(row: u32, quad: u32) -> vec4f {
  if (HAS_x2 && quad >= p.split) { return load_x2(row * (p.quads - p.split) + quad - p.split); }
  return load_x(row * p.split + quad);
}

@compute @workgroup_size(LANES, ROWS)
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_id) id: vec3u,
  @builtin(local_invocation_index) index: u32,
) {
  let quad = min(group.x * LANES + id.x, p.quads - 1u);
  let chunk = group.y;
  let start = group.z * p.tokens;
  let first = start + chunk * p.chunkTokens;
  let last = min(first + p.chunkTokens, start + p.tokens);
  // Summed as distances from the first token. A large common offset costs no digits, and as the origin is one of the n
  // values, even an outlier costs no more than a factor n of the roundoff (Chan, Golub, LeVeque 1983).
  let origin = at(first, quad);
  var sum = vec4f(0.0);
  var squares = vec4f(0.0);
  for (var row = first + id.y; row < last; row += TURN * ROWS) {
    for (var i = 0u; i < TURN; i++) {
      let v = at(min(row + i * ROWS, last - 1u), quad) - origin;
      let d = select(vec4f(0.0), v, row + i * ROWS < last);
      sum += d;
      squares += d * d;
    }
  }
  if (ROWS > 1u) {
    sums[index] = sum;
    squared[index] = squares;
    for (var step = ROWS / 2u; step > 0u; step /= 2u) {
      workgroupBarrier();
      if (id.y < step) {
        sums[index] += sums[index + step * LANES];
        squared[index] += squared[index + step * LANES];
      }
    }
    sum = sums[index];
    squares = squared[index];
  }
  if (id.y > 0u || group.x * LANES + id.x >= p.quads) { return; }
  let n = f32(last - first);
  let base = (group.z * p.chunks + chunk) * 2u * p.quads + quad;
  moments[base] = origin + sum / n;
  moments[base + p.quads] = max(squares - sum * sum / n, vec4f(0.0));
}
