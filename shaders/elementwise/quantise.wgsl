// Weights from a file into blocks of 8-bit numbers, k = (tap, channel). One dispatch packs a chunk of rows that starts at a panel.
// An invocation owns four columns of a block. Precondition: paddedChannels is a multiple of 32.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let block = id.x / 8u;
  if (block >= TAPS * p.paddedChannels / 32u) { return; }
  let tap = block / (p.paddedChannels / 32u);
  let channel = block % (p.paddedChannels / 32u) * 32u;
  var v = array<mat4x4f, 8>();
  for (var i = 0u; i < 8u; i++) {
    for (var c = 0u; c < 4u; c++) { v[i][c] = columns(id.y, id.x % 8u, tap, channel + 4u * i + c); }
  }
  putBlock((p.outPanel + id.y) * (TAPS * p.paddedChannels / 32u) + block, id.x % 8u, &v);
}
