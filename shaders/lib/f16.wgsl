// Storage f16: a Quad is four consecutive halves in two words, a Pair half of one, an Octet two of them. Unpacking is core WGSL: no
// feature is needed, and a software driver does it at full speed where f16 arithmetic would be emulated.

alias Pair = u32;
alias Quad = vec2u;
alias Octet = vec4u;

fn dec2(p: Pair) -> vec2f { return unpack2x16float(p); }
fn dec(q: Quad) -> vec4f { return vec4f(dec2(q.x), dec2(q.y)); }
fn dec8(o: Octet) -> array<vec4f, 2> { return array(dec(o.xy), dec(o.zw)); }

fn enc2(v: vec2f) -> Pair { return enc(vec4f(v, v)).x; }
fn enc(v: vec4f) -> Quad {
  let h = halves(v);
  return vec2u(h.x | (h.y << 16u), h.z | (h.w << 16u));
}
fn enc8(v: array<vec4f, 2>) -> Octet { return vec4u(enc(v[0]), enc(v[1])); }
