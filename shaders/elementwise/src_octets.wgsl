// What a file holds, where a row is whole octets of values: src as in src_words.wgsl, but read 16 bytes at a time, since software
// drivers pay by the load. Precondition: 8 divides channels * TAPS.

alias Source = vec4u;

// Values 8j .. 8j+7 of a row.
fn octet(row: u32, j: u32) -> mat2x4f {
  let at = row * (p.channels * TAPS / 8u) + j;
  if (SRC_DTYPE == 0u) { return mat2x4f(bitcast<vec4f>(src[2u * at]), bitcast<vec4f>(src[2u * at + 1u])); }
  let w = src[at];
  if (SRC_DTYPE == 1u) {
    return mat2x4f(
      vec4f(unpack2x16float(w.x), unpack2x16float(w.y)),
      vec4f(unpack2x16float(w.z), unpack2x16float(w.w)));
  }
  let low = bitcast<vec4f>(w << vec4u(16u));
  let high = bitcast<vec4f>(w & vec4u(0xffff0000u));
  return mat2x4f(vec4f(low.x, high.x, low.y, high.y), vec4f(low.z, high.z, low.w, high.w));
}

// The same of columns 4q .. 4q+3 of a panel of the chunk: two quads of values, a column of the matrix each. Columns past `rows` are 0.
fn octets(panel: u32, q: u32, j: u32) -> array<mat4x4f, 2> {
  var first: mat4x4f;
  var second: mat4x4f;
  for (var i = 0u; i < 4u; i++) {
    let row = panel * 32u + q * 4u + i;
    let v = octet(min(row, p.rows - 1u), j);
    first[i] = select(vec4f(0.0), v[0], row < p.rows);
    second[i] = select(vec4f(0.0), v[1], row < p.rows);
  }
  return array(transpose(first), transpose(second));
}
