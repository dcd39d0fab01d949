// quantise.wgsl by octets, for one tap. Precondition: channels is a multiple of 32.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let block = id.x / 8u;
  if (block >= p.channels / 32u) { return; }
  var v = array<mat4x4f, 8>();
  for (var j = 0u; j < 4u; j++) {
    let two = octets(id.y, id.x % 8u, block * 4u + j);
    v[2u * j] = two[0];
    v[2u * j + 1u] = two[1];
  }
  putBlock((p.outPanel + id.y) * (p.channels / 32u) + block, id.x % 8u, &v);
}
