// out[r, c] = (x[r, c] - mean_r) / sqrt(var_r + eps) * gamma[c] + beta[c] over the rows r of each image (biased variance).
// For any GPU: LANES invocations share a row and reduce through workgroup memory. Two passes over the row, so nothing
// cancels.

const LANES = 64u / ROWS;

var<workgroup> partial: array<f32, 64>;

fn reduce(index: u32, value: f32) -> f32 {
  partial[index] = value;
  for (var step = LANES / 2u; step > 0u; step /= 2u) {
    workgroupBarrier();
    if (index % LANES < step) { partial[index] += partial[index + step]; }
  }
  workgroupBarrier();
  let sum = partial[index - index % LANES];
  workgroupBarrier();
  return sum;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let row = group.x * ROWS + index / LANES;
  let base = ((p.image0 + group.y) * p.rows + min(row, p.rows - 1u)) * p.quads;
  let lane = index % LANES;
  var sum = vec4f(0.0);
  for (var q = lane; q < p.quads; q += LANES) { sum += load_x(base + q); }
  let mean = reduce(index, dot(sum, vec4f(1.0))) / f32(p.quads * 4u);
  var m2 = vec4f(0.0);
  for (var q = lane; q < p.quads; q += LANES) {
    let d = load_x(base + q) - mean;
    m2 += d * d;
  }
  let rstd = inverseSqrt(reduce(index, dot(m2, vec4f(1.0))) / f32(p.quads * 4u) + p.eps);
  if (row >= p.rows) { return; }
  for (var q = lane; q < p.quads; q += LANES) {
    save_out(base + q, (load_x(base + q) - mean) * rstd * gamma[q] + beta[q]);
  }
}
