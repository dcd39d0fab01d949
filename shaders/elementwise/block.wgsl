// Four columns of a block of 8-bit numbers (lib/w_q8_0.wgsl, two vec2u for each vec4u there): d = max |w| / 127 of a column over the
// 32 k of a block, rounded to a half, and each weight as the nearest multiple of d, at most 127 of them. A column of zeros has
// d = 0.

fn word(v: vec4f, d: vec4f) -> u32 {
  let steps = select(vec4f(0.0), clamp(round(v / d), vec4f(-127.0), vec4f(127.0)), d > vec4f(0.0));
  let b = bitcast<vec4u>(vec4i(steps)) & vec4u(0xffu);
  return b.x | (b.y << 8u) | (b.z << 16u) | (b.w << 24u);
}

// v[i] is k = 4i .. 4i+3 of the block, one a column of the matrix.
fn putBlock(block: u32, q: u32, v: ptr<function, array<mat4x4f, 8>>) {
  // Sizes compared as integers, in which NaN is the largest: it makes d NaN.
  var most = vec4u(0u);
  for (var i = 0u; i < 8u; i++) {
    for (var c = 0u; c < 4u; c++) { most = max(most, bitcast<vec4u>((*v)[i][c]) & vec4u(0x7fffffffu)); }
  }
  let h = halves(bitcast<vec4f>(most) / 127.0);
  let scales = vec2u(h.x | (h.y << 16u), h.z | (h.w << 16u));
  let d = vec4f(unpack2x16float(scales.x), unpack2x16float(scales.y));
  for (var i = 0u; i < 8u; i++) {
    let m = (*v)[i];
    let at = block * 136u + (i * 8u + q) * 2u;
    out[at] = vec2u(word(m[0], d), word(m[1], d));
    out[at + 1u] = vec2u(word(m[2], d), word(m[3], d));
  }
  out[block * 136u + 128u + q] = scales;
}
