// out[row][r][tap] = sum_i w[row][i][tap] left[i][r]: a weight times a thin matrix, over its input channels (or, with one tap,
// over all its columns). w [rows][channels][taps] in f32; left [channels][rank] from word leftAt on.
// An invocation owns one (r, tap) of four rows.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= p.rank * p.taps) { return; }
  let r = id.x / p.taps;
  let tap = id.x % p.taps;
  let row = id.y * 4u;
  let columns = p.channels * p.taps;
  var w0 = vec4u(row * columns + tap);
  for (var n = 1u; n < 4u; n++) { w0[n] = min(row + n, p.rows - 1u) * columns + tap; }
  var sum = vec4f(0.0);
  for (var i = 0u; i < p.channels; i++) {
    let at = w0 + i * p.taps;
    sum += left[p.leftAt + i * p.rank + r] * vec4f(w[at.x], w[at.y], w[at.z], w[at.w]);
  }
  for (var n = 0u; n < min(4u, p.rows - row); n++) { out[(row + n) * p.rank * p.taps + id.x] = sum[n]; }
}
