// Storage f32: a Quad is four consecutive stored values as they are, a Pair half of one, an Octet two of them.

alias Pair = vec2f;
alias Quad = vec4f;
alias Octet = array<vec4f, 2>;

fn dec2(p: Pair) -> vec2f { return p; }
fn dec(q: Quad) -> vec4f { return q; }
fn dec8(o: Octet) -> array<vec4f, 2> { return o; }

fn enc2(v: vec2f) -> Pair { return v; }
fn enc(v: vec4f) -> Quad { return v; }
fn enc8(v: array<vec4f, 2>) -> Octet { return v; }
