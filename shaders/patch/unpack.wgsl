// A packed weight back in a file's layout: out[row][channel][tap] = w[row / 32][tap][channel][row % 32], in f32.
//   w [panels][taps][paddedChannels][32] as lib/w_*.wgsl has it; out [rows][channels][taps].
// An invocation owns four rows of one column (channel, tap).

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let columns = p.channels * p.taps;
  let row = id.y * 4u;
  if (id.x >= columns || row >= p.rows) { return; }
  let k = id.x % p.taps * p.paddedChannels + id.x / p.taps;
  let v = load_w((row / 32u * p.taps * p.paddedChannels + k) * 8u + row % 32u / 4u);
  for (var i = 0u; i < min(4u, p.rows - row); i++) { out[(row + i) * columns + id.x] = v[i]; }
}
