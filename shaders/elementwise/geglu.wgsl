// out[r, c] = x[r, c] * gelu(x[r, inner + c]), gelu(v) = v * (1 + erf(v / sqrt 2)) / 2 (exact form, as PyTorch's default).
// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7. An invocation owns one output quad.

fn erf(v: vec4f) -> vec4f {
  let a = abs(v);
  let t = 1.0 / (1.0 + 0.3275911 * a);
  let poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return sign(v) * (1.0 - poly * exp(-a * a));
}

@compute @workgroup_size(16, 4)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= p.quads || id.y >= p.rows) { return; }
  let base = id.y * 2u * p.quads + id.x;
  let gate = load_x(base + p.quads);
  let gelu = gate * (0.5 + 0.5 * erf(gate * 0.70710678118654752));
  save_out(id.y * p.quads + id.x, load_x(base) * gelu);
}
