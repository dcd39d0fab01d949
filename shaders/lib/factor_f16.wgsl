// Factors of matrix units that multiply halves and add in f32. What is stored in f16 is one as it is, and an 8-bit weight with
// its scale is rounded to one; f32 values (T of the low-rank terms, the residual stream) are the sum of two, of which 22 bits
// count.

alias Factor = f16;

// Factors that make one f32 value.
const PARTS = 2u;

// Pairs of words that hold four factors.
const PAIRS = 1u;

fn factor(v: vec4f) -> vec4<Factor> { return vec4<Factor>(v); }

fn pairsOf(v: vec4f) -> array<vec2u, PAIRS> { return array(bitcast<vec2u>(factor(v))); }

// The nearest half, by its bits: drivers may take a value for what is left of it after conversion there and back. Sizes past
// the largest half saturate.
fn rounded(v: vec4f) -> vec4f {
  let bits = bitcast<vec4u>(clamp(v, vec4f(-65504.0), vec4f(65504.0)));
  return bitcast<vec4f>((bits + vec4u(0x1000u)) & vec4u(0xffffe000u));
}

fn firstPart(v: vec4f) -> vec4<Factor> { return factor(rounded(v)); }

fn secondPart(v: vec4f) -> vec4<Factor> { return factor(v - rounded(v)); }
