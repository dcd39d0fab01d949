// Weights from a file into the layouts that the GEMM kernels read (lib/w_*.wgsl): panels of 32 columns, k = (tap, channel).
//   src is rows of OIHW (or [out, in] with one tap) as the file holds them: F32, F16 or BF16 in 32-bit words;
//   out columns past `rows` and channels past `channels` are 0.
// One dispatch packs a chunk of rows that starts at a panel. An invocation owns four columns of one or several k, which the
// file of the layout knows.

fn srcAt(i: u32) -> f32 {
  if (SRC_DTYPE == 0u) { return bitcast<f32>(src[i]); }
  let word = src[i / 2u];
  let half = select(word & 0xffffu, word >> 16u, i % 2u == 1u);
  if (SRC_DTYPE == 1u) { return unpack2x16float(half).x; }
  return bitcast<f32>(half << 16u);
}

// Columns 4q .. 4q+3 of a panel of the chunk at one k.
fn columns(panel: u32, k: u32, q: u32) -> vec4f {
  let tap = k / p.paddedChannels;
  let channel = k % p.paddedChannels;
  var v = vec4f(0.0);
  for (var i = 0u; i < 4u; i++) {
    let row = panel * 32u + q * 4u + i;
    if (row < p.rows && channel < p.channels) { v[i] = srcAt((row * p.channels + channel) * p.taps + tap); }
  }
  return v;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let k = id.x / 8u * K_EACH;
  if (k < p.taps * p.paddedChannels) { packColumns(id.y, k, id.x % 8u); }
}
