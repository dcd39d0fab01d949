// Per-channel mean and sum of squared deviations over a chunk of tokens, the first step of a group norm:
//   mean[image, chunk, c] = sum_t x[image, t, c] / tokens of the chunk
//   m2[image, chunk, c]   = sum_t (x[image, t, c] - mean)^2
// x as in source.wgsl, all of it read once; moments [image][chunk][2][quads] in f32. A workgroup owns LANES * COLUMNS quads of
// channels and a chunk of tokens: lane l the quads l, l + LANES, ... of each ROWS-th token.

var<workgroup> sums: array<vec4f, LANES * ROWS>;
var<workgroup> squared: array<vec4f, LANES * ROWS>;

// Sums over the rows of a workgroup, for those of its first.
fn reduced(index: u32, sum: vec4f, squares: vec4f) -> array<vec4f, 2> {
  if (ROWS == 1u) { return array(sum, squares); }
  sums[index] = sum;
  squared[index] = squares;
  for (var step = LANES * ROWS / 2u; step >= LANES; step /= 2u) {
    workgroupBarrier();
    if (index < step) {
      sums[index] += sums[index + step];
      squared[index] += squared[index + step];
    }
  }
  let all = array(sums[index], squared[index]);
  workgroupBarrier();
  return all;
}

@compute @workgroup_size(LANES, ROWS)
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_id) id: vec3u,
  @builtin(local_invocation_index) index: u32,
) {
  let rows = rowsOf(group.z, group.y);
  let quad = group.x * LANES * COLUMNS + id.x;
  // Summed as distances from the first token. A large common offset costs no digits, and as the origin is one of the n
  // values, even an outlier costs no more than a factor n of the roundoff (Chan, Golub, LeVeque 1983).
  var origin = array<vec4f, COLUMNS>();
  var sum = array<vec4f, COLUMNS>();
  var squares = array<vec4f, COLUMNS>();
  for (var c = 0u; c < COLUMNS; c++) { origin[c] = at(rows[0], min(quad + c * LANES, p.quads - 1u)); }
  for (var row = rows[0] + id.y; row < rows[1]; row += ROWS) {
    for (var c = 0u; c < COLUMNS; c++) {
      let d = at(row, min(quad + c * LANES, p.quads - 1u)) - origin[c];
      sum[c] += d;
      squares[c] += d * d;
    }
  }
  let n = f32(rows[1] - rows[0]);
  let base = (group.z * p.chunks + group.y) * 2u * p.quads + quad;
  for (var c = 0u; c < COLUMNS; c++) {
    let all = reduced(index, sum[c], squares[c]);
    if (id.y == 0u && quad + c * LANES < p.quads) {
      moments[base + c * LANES] = origin[c] + all[0] / n;
      moments[base + c * LANES + p.quads] = max(all[1] - all[0] * all[0] / n, vec4f(0.0));
    }
  }
}
