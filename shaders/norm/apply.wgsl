// Second step of a group norm: out[image, t, c] = act((x[image, t, c] - mean) / sqrt(var + eps) * gamma[c] + beta[c]) with mean
// and variance of c's group in the image, act = SiLU or none. Workgroups own what they own in moments.wgsl; each folds the
// moments of its own groups, and its invocations keep one quad's scale and shift.
// x is two tensors side by side as in moments.wgsl; out is one tensor, so what follows sees the concatenation.
// Preconditions: channels = groups * groupChannels; chunkTokens is a multiple of TURN * ROWS.

// Tokens of a turn, as in moments.wgsl.
const TURN = 4u;

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
  let image = p.image0 + group.z;
  let affine = affineOf(image, group.x * LANES, index);
  let quad = group.x * LANES + id.x;
  if (quad >= p.quads) { return; }
  let start = image * p.tokens;
  let first = start + group.y * p.chunkTokens;
  let last = min(first + p.chunkTokens, start + p.tokens);
  for (var row = first + id.y; row < last; row += TURN * ROWS) {
    var v = array<vec4f, TURN>();
    for (var i = 0u; i < TURN; i++) { v[i] = at(min(row + i * ROWS, last - 1u), quad) * affine.scale + affine.shift; }
    for (var i = 0u; i < TURN; i++) {
      if (SILU) { v[i] = v[i] / (1.0 + exp(-v[i])); }
      if (row + i * ROWS < last) { save_out((row + i * ROWS) * p.quads + quad, v[i]); }
    }
  }
}
