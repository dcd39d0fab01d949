// out[image, token, c] = src[image, c, token] (+ add[image, token, c]); channels past `channels` become 0.
// Turns what clients send (NCHW) into the layout of activations (NHWC, channels padded to quads); with `add` it sums a
// residual into an activation. An invocation owns one output quad.

fn srcAt(i: u32) -> f32 { return load_src(i / 4u)[i % 4u]; }

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let token = id.x;
  let quad = id.y;
  let image = id.z;
  if (token >= p.tokens) { return; }
  var v = vec4f(0.0);
  for (var i = 0u; i < 4u; i++) {
    let c = quad * 4u + i;
    if (c < p.channels) { v[i] = srcAt((image * p.channels + c) * p.tokens + token); }
  }
  let at = (image * p.tokens + token) * p.quads + quad;
  if (HAS_add) { v += load_add(at); }
  save_out(at, v);
}
