// out[image, c, token] = x[image, token, c] in f32, whatever the storage: what clients receive. Padding channels are
// dropped. An invocation owns one quad of x.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let token = id.x;
  let quad = id.y;
  let image = id.z;
  if (token >= p.tokens) { return; }
  let v = load_x((image * p.tokens + token) * p.quads + quad);
  for (var i = 0u; i < 4u; i++) {
    let c = quad * 4u + i;
    if (c < p.channels) { out[(image * p.channels + c) * p.tokens + token] = v[i]; }
  }
}
