// Storage f16: a Quad is four consecutive halves in two words. Packing and unpacking are core WGSL: no feature is
// needed, and a software driver does them at full speed where f16 arithmetic would be emulated.

alias Quad = vec2u;

fn dec(q: Quad) -> vec4f { return vec4f(unpack2x16float(q.x), unpack2x16float(q.y)); }

// Values past the largest half saturate; what WGSL makes of them otherwise is undefined.
fn enc(v: vec4f) -> Quad {
  let c = clamp(v, vec4f(-65504.0), vec4f(65504.0));
  return vec2u(pack2x16float(c.xy), pack2x16float(c.zw));
}
