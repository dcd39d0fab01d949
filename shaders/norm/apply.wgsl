// Last step of a group norm: out[image, t, c] = act(x[image, t, c] * affine[0][c] + affine[1][c]), act = SiLU or none.
// x is two tensors side by side as in moments.wgsl; out is one tensor, so what follows sees the concatenation.
// An invocation owns one quad of channels of `rows` consecutive tokens. Precondition: rows is a multiple of TURN.

// Tokens of a turn, as in moments.wgsl.
const TURN = 4u;

fn at(row: u32, quad: u32) -> vec4f {
  if (HAS_x2 && quad >= p.split) { return load_x2(row * (p.quads - p.split) + quad - p.split); }
  return load_x(row * p.split + quad);
}

@compute @workgroup_size(16, 4)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let quad = id.x;
  let image = id.z;
  if (quad >= p.quads) { return; }
  let scale = affine[image * 2u * p.quads + quad];
  let shift = affine[(image * 2u + 1u) * p.quads + quad];
  let first = image * p.tokens + id.y * p.rows;
  let last = min(first + p.rows, (image + 1u) * p.tokens);
  for (var row = first; row < last; row += TURN) {
    var v = array<vec4f, TURN>();
    for (var i = 0u; i < TURN; i++) { v[i] = at(min(row + i, last - 1u), quad) * scale + shift; }
    for (var i = 0u; i < TURN; i++) {
      if (SILU) { v[i] = v[i] / (1.0 + exp(-v[i])); }
      if (row + i < last) { save_out((row + i) * p.quads + quad, v[i]); }
    }
  }
}
