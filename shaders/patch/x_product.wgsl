// X[row, (channel, tap)] = sum_r x[row][r][tap] right[r][channel] over `terms` ranks: the second half of a weight times two
// thin matrices, whose first half product.wgsl makes. columnDiv is the number of taps; x from word xAt, right from word rightAt on.

fn valuesX(row: u32, column: u32) -> vec4f {
  let taps = p.columnDiv;
  let channels = p.columns / taps;
  let right0 = p.rightAt + column / taps;
  var x0 = vec4u(p.xAt + column % taps);
  for (var i = 0u; i < 4u; i++) { x0[i] += min(row + i, p.rows - 1u) * p.terms * taps; }
  var v = vec4f(0.0);
  for (var r = 0u; r < p.terms; r++) {
    let at = x0 + r * taps;
    v += right[right0 + r * channels] * bitcast<vec4f>(vec4u(x[at.x], x[at.y], x[at.z], x[at.w]));
  }
  return v;
}
