// out[r, c] = x[r, c] * gelu(x[r, inner + c]), gelu(v) = v * (1 + erf(v / sqrt 2)) / 2 (exact form, as PyTorch's default).
// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7. An invocation owns one quad of ROWS consecutive rows:
// starting one costs a software driver more than a quad.

const ROWS = 4u;

// (1 + erf(v)) / 2
fn phi(v: vec4f) -> vec4f {
  let a = abs(v);
  let t = 1.0 / (1.0 + 0.3275911 * a);
  let poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  let tail = 0.5 * poly * exp(-a * a);
  return select(1.0 - tail, tail, v < vec4f(0.0));
}

@compute @workgroup_size(16, 4)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= p.quads) { return; }
  for (var i = 0u; i < ROWS; i++) {
    let row = id.y * ROWS + i;
    if (row < p.rows) {
      let base = row * 2u * p.quads + id.x;
      let gate = load_x(base + p.quads);
      save_out(row * p.quads + id.x, load_x(base) * gate * phi(gate * 0.70710678118654752));
    }
  }
}
