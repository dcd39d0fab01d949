// Storage f32: a Quad is four consecutive stored values as they are.

alias Quad = vec4f;

fn dec(q: Quad) -> vec4f { return q; }

fn enc(v: vec4f) -> Quad { return v; }
