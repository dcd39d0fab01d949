// pack.wgsl by octets: an invocation owns four columns of eight values that follow one another in the file.

fn put(panel: u32, q: u32, f: u32, v: mat4x4f) {
  for (var i = 0u; i < 4u; i++) {
    let k = (f + i) % TAPS * p.channels + (f + i) / TAPS;
    save_out((panel * TAPS * p.channels + k) * 8u + q, v[i]);
  }
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let j = id.x / 8u;
  let q = id.x % 8u;
  if (j >= p.channels * TAPS / 8u) { return; }
  let v = octets(id.y, q, j);
  put(p.outPanel + id.y, q, 8u * j, v[0]);
  put(p.outPanel + id.y, q, 8u * j + 4u, v[1]);
}
