// What a file holds, of any shape: src is rows of OIHW (or [out, in] with one tap) in F32, F16 or BF16, in 32-bit words.

alias Source = u32;

fn srcAt(i: u32) -> f32 {
  if (SRC_DTYPE == 0u) { return bitcast<f32>(src[i]); }
  let word = src[i / 2u];
  let half = select(word & 0xffffu, word >> 16u, i % 2u == 1u);
  if (SRC_DTYPE == 1u) { return unpack2x16float(half).x; }
  return bitcast<f32>(half << 16u);
}

// Columns 4q .. 4q+3 of a panel of the chunk; columns past `rows` and channels past `channels` are 0.
fn columns(panel: u32, q: u32, tap: u32, channel: u32) -> vec4f {
  var v = vec4f(0.0);
  for (var i = 0u; i < 4u; i++) {
    let row = panel * 32u + q * 4u + i;
    if (row < p.rows && channel < p.channels) { v[i] = srcAt((row * p.channels + channel) * TAPS + tap); }
  }
  return v;
}
