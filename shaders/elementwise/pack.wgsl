// Weights from a file into the layout the GEMM kernels read: out [n / WIDTH][k][WIDTH] in Quads, k = (tap, channel).
//   src is rows of OIHW (or [out, in] with one tap) as the file holds them: F32, F16 or BF16 in 32-bit words;
//   out columns past `rows` and channels past `channels` are 0.
// One dispatch packs a chunk of rows that starts at a panel. An invocation owns one output quad: four columns of one k.

fn srcAt(i: u32) -> f32 {
  if (SRC_DTYPE == 0u) { return bitcast<f32>(src[i]); }
  let word = src[i / 2u];
  let half = select(word & 0xffffu, word >> 16u, i % 2u == 1u);
  if (SRC_DTYPE == 1u) { return unpack2x16float(half).x; }
  return bitcast<f32>(half << 16u);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let quads = WIDTH / 4u;
  let k = id.x / quads;
  if (k >= p.taps * p.paddedChannels) { return; }
  let panel = id.y;
  let tap = k / p.paddedChannels;
  let channel = k % p.paddedChannels;
  var v = vec4f(0.0);
  for (var i = 0u; i < 4u; i++) {
    let row = panel * WIDTH + id.x % quads * 4u + i;
    if (row < p.rows && channel < p.channels) {
      v[i] = srcAt((row * p.channels + channel) * p.taps + tap);
    }
  }
  save_out(p.outOffset + panel * p.taps * p.paddedChannels * quads + id.x, v);
}
