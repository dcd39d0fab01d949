// out[r, c] = (x[r, c] - mean_r) / sqrt(var_r + eps) * gamma[c] + beta[c] over the rows r of each image (biased variance).
// For drivers whose subgroups have 8 lanes (software). A subgroup owns ROWS rows, lane l their quads l, l + 8, ...: it
// reads every row twice and gamma and beta once, in f32 throughout.
// Preconditions: subgroups of 8 lanes, ROWS = 4.

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let image = (p.image0 + group.y) * p.rows;
  let row = vec4u(group.x * ROWS) + vec4u(0u, 1u, 2u, 3u);
  let base = (image + min(row, vec4u(p.rows - 1u))) * p.quads;
  // A lane's four columns of a row are summed as distances from its first quad: see moments.wgsl.
  var origin: array<vec4f, ROWS>;
  var sum: array<vec4f, ROWS>;
  var squares: array<vec4f, ROWS>;
  for (var r = 0u; r < ROWS; r++) { origin[r] = load_x(base[r] + min(lane, p.quads - 1u)); }
  for (var q = lane + 8u; q < p.quads; q += 8u) {
    for (var r = 0u; r < ROWS; r++) {
      let d = load_x(base[r] + q) - origin[r];
      sum[r] += d;
      squares[r] += d * d;
    }
  }

  // Quads of this lane: none where a row has fewer than 8.
  let n = f32((p.quads + 7u - lane) / 8u);
  let width = f32(p.quads * 4u);
  var mean: array<f32, ROWS>;
  var rstd: array<f32, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    let shift = sum[r] / max(n, 1.0);
    mean[r] = laneSum(n * dot(origin[r] + shift, vec4f(1.0))) / width;
    let d = origin[r] + shift - mean[r];
    let m2 = max(squares[r] - sum[r] * shift, vec4f(0.0)) + n * d * d;
    rstd[r] = inverseSqrt(laneSum(dot(m2, vec4f(1.0))) / width + p.eps);
  }

  for (var q = lane; q < p.quads; q += 8u) {
    let scale = gamma[q];
    let shift = beta[q];
    for (var r = 0u; r < ROWS; r++) {
      let y = (load_x(base[r] + q) - mean[r]) * rstd[r] * scale + shift;
      if (row[r] < p.rows) { save_out(base[r] + q, y); }
    }
  }
}
