// The distribution function of the normal law, for gelu(v) = v * phi(v) (exact form, as PyTorch's default).
// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.

// (1 + erf(v / sqrt 2)) / 2
fn phi(v: vec4f) -> vec4f {
  let a = abs(v) * 0.70710678118654752;
  let t = 1.0 / (1.0 + 0.3275911 * a);
  let poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  let tail = 0.5 * poly * exp(-a * a);
  return select(1.0 - tail, tail, v < vec4f(0.0));
}
