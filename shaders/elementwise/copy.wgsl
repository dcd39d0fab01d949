// out[i] = x[i]. An invocation owns one quad.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let i = id.y * p.rowQuads + id.x;
  if (id.x < p.rowQuads && i < p.quads) { save_out(i, load_x(i)); }
}
