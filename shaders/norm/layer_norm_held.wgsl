// out[r, c] = (x[r, c] - mean_r) / sqrt(var_r + eps) * gamma[c] + beta[c] over the rows r of each image (biased variance).
// For drivers whose subgroups have 8 lanes (software), where a load costs more than all the arithmetic on what it loads. A
// subgroup owns ROWS rows, one after the other, lane l their quads l, l + 8, ...; it holds a row, so that it reads each once,
// and gamma and beta, in f32 throughout. Two passes over what it holds, so nothing cancels.
// Preconditions: subgroups of 8 lanes; rows of at most 8 * HELD quads.

// Quads of a lane: 320 channels. Twice as many take four times as long to compile.
const HELD = 10u;

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  var scale = array<vec4f, HELD>();
  var shift = array<vec4f, HELD>();
  // Not unrolled, as it is done once: that halves the time to compile.
  for (var q = lane; q < p.quads; q += 8u) {
    scale[q / 8u] = gamma[q];
    shift[q / 8u] = beta[q];
  }
  let width = f32(p.quads * 4u);
  let last = min((group.x + 1u) * ROWS, p.rows);
  for (var row = group.x * ROWS; row < last; row++) {
    let base = ((p.image0 + group.y) * p.rows + row) * p.quads;
    var v = array<vec4f, HELD>();
    var sum = vec4f(0.0);
    for (var i = 0u; i < HELD; i++) {
      v[i] = load_x(base + min(lane + 8u * i, p.quads - 1u));
      sum += select(vec4f(0.0), v[i], lane + 8u * i < p.quads);
    }
    let mean = subgroupAdd(dot(sum, vec4f(1.0))) / width;
    var m2 = vec4f(0.0);
    for (var i = 0u; i < HELD; i++) {
      v[i] -= mean;
      m2 += select(vec4f(0.0), v[i] * v[i], lane + 8u * i < p.quads);
    }
    let rstd = inverseSqrt(subgroupAdd(dot(m2, vec4f(1.0))) / width + p.eps);
    for (var i = 0u; i < HELD; i++) {
      let q = lane + 8u * i;
      if (q < p.quads) { save_out(base + q, v[i] * rstd * scale[i] + shift[i]); }
    }
  }
}
