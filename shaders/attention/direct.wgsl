// out[z, i, h, :] = sum_j softmax_j(scale * q[z, i, h, :] . k[z, j, h, :]) v[z, j, h, :], streamed over j: the scores are
// never stored (online softmax: Milakov and Gimelshein 2018; FlashAttention 2, Dao 2023).
//   q, out [image, token, head, HEAD_QUADS]; k, v [image, key, head, HEAD_QUADS], in Quads.
// For any GPU: an invocation owns one query of one head; neighbours read the same keys at the same time.

const KEYS = 4u;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= p.queries) { return; }
  let head = id.y * HEAD_QUADS;
  let qBase = (id.z * p.queries + id.x) * p.rowQuads + head;
  let kBase = id.z * p.keys * p.rowQuads + head;
  var a: array<vec4f, HEAD_QUADS>;
  var sum: array<vec4f, HEAD_QUADS>;
  for (var d = 0u; d < HEAD_QUADS; d++) { a[d] = load_q(qBase + d) * p.scale; }
  var top = -3.0e38;
  var total = 0.0;
  for (var j = 0u; j < p.keys; j += KEYS) {
    var s = array<f32, KEYS>();
    var high = top;
    for (var n = 0u; n < KEYS; n++) {
      let base = kBase + min(j + n, p.keys - 1u) * p.rowQuads;
      var score = vec4f(0.0);
      for (var d = 0u; d < HEAD_QUADS; d++) { score += a[d] * load_k(base + d); }
      s[n] = dot(score, vec4f(1.0));
      high = max(high, s[n]);
    }
    let shrink = exp(top - high);
    top = high;
    total *= shrink;
    for (var n = 0u; n < KEYS; n++) {
      s[n] = select(0.0, exp(s[n] - high), j + n < p.keys);
      total += s[n];
    }
    for (var d = 0u; d < HEAD_QUADS; d++) {
      var r = sum[d] * shrink;
      for (var n = 0u; n < KEYS; n++) { r += s[n] * load_v(kBase + min(j + n, p.keys - 1u) * p.rowQuads + d); }
      sum[d] = r;
    }
  }
  for (var d = 0u; d < HEAD_QUADS; d++) { save_out(qBase + d, sum[d] / total); }
}
