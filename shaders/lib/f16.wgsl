// Storage f16: a Quad is four consecutive halves in two words. Unpacking is core WGSL: no feature is needed, and a software
// driver does it at full speed where f16 arithmetic would be emulated.

alias Quad = vec2u;

fn dec(q: Quad) -> vec4f { return vec4f(unpack2x16float(q.x), unpack2x16float(q.y)); }

fn enc(v: vec4f) -> Quad {
  let h = halves(v);
  return vec2u(h.x | (h.y << 16u), h.z | (h.w << 16u));
}

// Two neighbouring Quads.
alias Octet = vec4u;

fn dec_octet(o: Octet) -> array<vec4f, 2> { return array(dec(o.xy), dec(o.zw)); }

fn enc_octet(v: array<vec4f, 2>) -> Octet { return vec4u(enc(v[0]), enc(v[1])); }
