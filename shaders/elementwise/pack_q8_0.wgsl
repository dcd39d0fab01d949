// Into blocks of 8-bit numbers (lib/w_q8_0.wgsl, two vec2u for each vec4u there): d = max |w| / 127 of a column over the 32 k of
// a block, rounded to a half, and each weight as the nearest multiple of d, at most 127 of them. A column of zeros has d = 0.
// Precondition: taps * paddedChannels is a multiple of 32.

alias Weights = vec2u;

const K_EACH = 32u;

fn word(v: vec4f, d: vec4f) -> u32 {
  let steps = select(vec4f(0.0), clamp(round(v / d), vec4f(-127.0), vec4f(127.0)), d > vec4f(0.0));
  let b = bitcast<vec4u>(vec4i(steps)) & vec4u(0xffu);
  return b.x | (b.y << 8u) | (b.z << 16u) | (b.w << 24u);
}

fn packColumns(panel: u32, k: u32, q: u32) {
  // Sizes compared as integers, in which NaN is the largest: it makes d NaN.
  var most = vec4u(0u);
  for (var i = 0u; i < 32u; i++) { most = max(most, bitcast<vec4u>(columns(panel, k + i, q)) & vec4u(0x7fffffffu)); }
  let h = halves(bitcast<vec4f>(most) / 127.0);
  let scales = vec2u(h.x | (h.y << 16u), h.z | (h.w << 16u));
  let d = vec4f(unpack2x16float(scales.x), unpack2x16float(scales.y));

  let block = ((p.outPanel + panel) * p.taps * p.paddedChannels + k) / 32u * 136u;
  for (var i = 0u; i < 32u; i += 2u) {
    let pair = vec2u(word(columns(panel, k + i, q), d), word(columns(panel, k + i + 1u, q), d));
    out[block + (i / 4u * 8u + q) * 2u + i / 2u % 2u] = pair;
  }
  out[block + 128u + q] = scales;
}
