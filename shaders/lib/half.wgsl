// Bits of the nearest halves, ties to even; past the largest half values saturate, NaN stays NaN. pack2x16float may round either
// way and leaves overflow undefined, and lavapipe takes 50 instructions and two branches a value for it.
fn halves(v: vec4f) -> vec4u {
  let bits = bitcast<vec4u>(v);
  let size = bits & vec4u(0x7fffffffu);
  let m = min(size, vec4u(0x477fe000u));
  // The exponent's bias falls from 127 to 15; half a unit, less one where the unit's bit is 0, rounds.
  let normal = (m + vec4u(0xc8000fffu) + ((m >> vec4u(13u)) & vec4u(1u))) >> vec4u(13u);
  // Below the least normal half: at 0.5 a unit of f32 is the denormals' unit, so the addition rounds.
  let denormal = bitcast<vec4u>(bitcast<vec4f>(m) + 0.5) - vec4u(0x3f000000u);
  let rounded = select(normal, denormal, m < vec4u(0x38800000u));
  return select(rounded, vec4u(0x7e00u), size > vec4u(0x7f800000u)) | ((bits >> vec4u(16u)) & vec4u(0x8000u));
}
