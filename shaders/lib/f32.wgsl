// Storage f32: a Quad is four consecutive stored values as they are.

alias Quad = vec4f;

fn dec(q: Quad) -> vec4f { return q; }

fn enc(v: vec4f) -> Quad { return v; }

// Two neighbouring Quads.
alias Octet = array<vec4f, 2>;

fn dec_octet(o: Octet) -> array<vec4f, 2> { return o; }

fn enc_octet(v: array<vec4f, 2>) -> Octet { return v; }
