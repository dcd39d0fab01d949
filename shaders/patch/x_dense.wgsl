// X[row, column] = x[row / rowDiv][column / columnDiv], a matrix with rows of `stride` values from word xAt on, as a file
// holds them: DTYPE 0 is F32, 1 is F16, 2 is BF16.

fn denseAt(i: u32) -> f32 {
  if (DTYPE == 0u) { return bitcast<f32>(x[p.xAt + i]); }
  let word = x[p.xAt + i / 2u];
  let half = select(word & 0xffffu, word >> 16u, i % 2u == 1u);
  if (DTYPE == 1u) { return unpack2x16float(half).x; }
  return bitcast<f32>(half << 16u);
}

// The values of four rows of one column; a row past the end is the last one.
fn valuesX(row: u32, column: u32) -> vec4f {
  let at = column / p.columnDiv;
  var v = vec4f(0.0);
  for (var i = 0u; i < 4u; i++) { v[i] = denseAt(min(row + i, p.rows - 1u) / p.rowDiv * p.stride + at); }
  return v;
}
