// Second step of a group norm: out[image, t, c] = act((x[image, t, c] - mean) / sqrt(var + eps) * gamma[c] + beta[c]) with mean
// and variance of c's group in the image, act = SiLU or none.
// x and who owns what of it as in source.wgsl; out is one tensor, so what follows sees the concatenation. A workgroup folds the
// moments of the groups that its channels lie in; its invocations keep scale and shift of their quads.
// Precondition: channels = groups * groupChannels.

@compute @workgroup_size(LANES, ROWS)
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_id) id: vec3u,
  @builtin(local_invocation_index) index: u32,
) {
  let image = p.image0 + group.z;
  let rows = rowsOf(image, group.y);
  let firstQuad = group.x * LANES * COLUMNS;
  let affines = affinesOf(image, firstQuad, index);
  for (var row = rows[0] + id.y; row < rows[1]; row += ROWS) {
    for (var c = 0u; c < COLUMNS; c++) {
      let quad = firstQuad + id.x + c * LANES;
      var v = at(row, min(quad, p.quads - 1u)) * affines[c].scale + affines[c].shift;
      if (SILU) { v = v / (1.0 + exp(-v)); }
      if (quad < p.quads) { save_out(row * p.quads + quad, v); }
    }
  }
}
