// Last step of a group norm: out[image, t, c] = act(x[image, t, c] * affine[0][c] + affine[1][c]), act = SiLU or none.
// x is two tensors side by side as in moments.wgsl; out is one tensor, so what follows sees the concatenation.
// An invocation owns one quad of channels of ROWS consecutive tokens.

const ROWS = 4u;

@compute @workgroup_size(16, 4)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let quad = id.x;
  let image = id.z;
  if (quad >= p.quads) { return; }
  let scale = affine[image * 2u * p.quads + quad];
  let shift = affine[(image * 2u + 1u) * p.quads + quad];
  for (var t = id.y * ROWS; t < min((id.y + 1u) * ROWS, p.tokens); t++) {
    let row = image * p.tokens + t;
    var v = vec4f();
    if (HAS_x2 && quad >= p.split) {
      v = load_x2(row * (p.quads - p.split) + quad - p.split);
    } else {
      v = load_x(row * p.split + quad);
    }
    v = v * scale + shift;
    if (SILU) { v = v / (1.0 + exp(-v)); }
    save_out(row * p.quads + quad, v);
  }
}
