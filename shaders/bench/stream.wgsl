// The copy rate of an adapter: out[i] = x[i], four quads of f32 an invocation, one workgroup's apart. Bytes moved: read
// plus written. No part of any model; bench/peak.ts runs it.

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let at = group.x * 256u + index;
  let a = x[at];
  let b = x[at + 64u];
  let c = x[at + 128u];
  let d = x[at + 192u];
  out[at] = a;
  out[at + 64u] = b;
  out[at + 128u] = c;
  out[at + 192u] = d;
}
