// out[r, c] = (x[r, c] - mean_r) / sqrt(var_r + eps) * gamma[c] + beta[c] over the rows r of each image (biased variance).
// For drivers whose subgroups have 8 lanes (software), where a load costs more than all the arithmetic on what it loads. A
// subgroup owns ROWS rows, one after the other, lane l their octets l, l + 8, ...; it holds a row, so that it reads each once,
// and gamma and beta, in f32 throughout. Two passes over what it holds, so nothing cancels.
// Preconditions: subgroups of 8 lanes; rows of at most 8 * HELD octets, of whole octets.

// Octets of a lane: 320 channels. Twice as many take four times as long to compile.
const HELD = 5u;

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let octets = p.quads / 2u;
  var scale = array<array<vec4f, 2>, HELD>();
  var shift = array<array<vec4f, 2>, HELD>();
  // Not unrolled, as it is done once: that halves the time to compile.
  for (var o = lane; o < octets; o += 8u) {
    scale[o / 8u] = array(gamma[2u * o], gamma[2u * o + 1u]);
    shift[o / 8u] = array(beta[2u * o], beta[2u * o + 1u]);
  }
  let width = f32(p.quads * 4u);
  let last = min((group.x + 1u) * ROWS, p.rows);
  for (var row = group.x * ROWS; row < last; row++) {
    let base = ((p.image0 + group.y) * p.rows + row) * octets;
    var v = array<array<vec4f, 2>, HELD>();
    var sum = vec4f(0.0);
    for (var i = 0u; i < HELD; i++) {
      v[i] = load8_x(base + min(lane + 8u * i, octets - 1u));
      sum += select(vec4f(0.0), v[i][0] + v[i][1], lane + 8u * i < octets);
    }
    let mean = laneSum(dot(sum, vec4f(1.0))) / width;
    var m2 = vec4f(0.0);
    for (var i = 0u; i < HELD; i++) {
      v[i] = array(v[i][0] - mean, v[i][1] - mean);
      m2 += select(vec4f(0.0), v[i][0] * v[i][0] + v[i][1] * v[i][1], lane + 8u * i < octets);
    }
    let rstd = inverseSqrt(laneSum(dot(m2, vec4f(1.0))) / width + p.eps);
    for (var i = 0u; i < HELD; i++) {
      let o = lane + 8u * i;
      if (o < octets) {
        save8_out(base + o, array(v[i][0] * rstd * scale[i][0] + shift[i][0], v[i][1] * rstd * scale[i][1] + shift[i][1]));
      }
    }
  }
}
