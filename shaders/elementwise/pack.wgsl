// Weights from a file into Quads of the storage dtype (lib/w_quads.wgsl), k = (tap, channel). One dispatch packs a chunk of rows
// that starts at a panel. An invocation owns four columns of one k.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let k = id.x / 8u;
  if (k >= TAPS * p.paddedChannels) { return; }
  let v = columns(id.y, id.x % 8u, k / p.paddedChannels, k % p.paddedChannels);
  save_out((p.outPanel + id.y) * TAPS * p.paddedChannels * 8u + id.x, v);
}
