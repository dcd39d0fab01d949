// Bits of the nearest halves, ties to even; past the largest half values saturate, NaN stays NaN. pack2x16float may round either
// way and leaves overflow undefined, and lavapipe takes 50 instructions and two branches a value for it.
fn halves(v: vec4f) -> vec4u {
  let bits = bitcast<vec4u>(v);
  let size = bits & vec4u(0x7fffffffu);
  let m = min(size, vec4u(0x477fe000u));
  // The power of two whose last place is the half's, at least the denormals': the sum with it is rounded there, and how far its
  // bits are from the power's counts the half's units.
  let power = max(m & vec4u(0x7f800000u), vec4u(0x38800000u)) + vec4u(0x06800000u);
  let units = bitcast<vec4u>(bitcast<vec4f>(m) + bitcast<vec4f>(power)) - power;
  // The exponent's bias falls from 127 to 15, less the leading 1, which is one of the units' bits.
  let rounded = units + ((power - vec4u(0x3f000000u)) >> vec4u(13u));
  return select(rounded, vec4u(0x7e00u), size > vec4u(0x7f800000u)) | ((bits >> vec4u(16u)) & vec4u(0x8000u));
}
