// Factors of matrix units that multiply and add in f32: every value is one.

alias Factor = f32;

// Factors that make one f32 value.
const PARTS = 1u;

// Pairs of words that hold four factors.
const PAIRS = 2u;

fn factor(v: vec4f) -> vec4<Factor> { return v; }

fn pairsOf(v: vec4f) -> array<vec2u, PAIRS> { return array(bitcast<vec2u>(v.xy), bitcast<vec2u>(v.zw)); }

fn rounded(v: vec4f) -> vec4f { return v; }

fn firstPart(v: vec4f) -> vec4<Factor> { return v; }

fn secondPart(v: vec4f) -> vec4<Factor> { return vec4f(0.0); }
