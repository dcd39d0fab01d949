// out[z, i, h, :] = sum_j softmax_j(scale * q[z, i, h, :] . k[z, j, h, :]) v[z, j, h, :], streamed over j: the scores are
// never stored (online softmax: Milakov and Gimelshein 2018; FlashAttention 2, Dao 2023).
//   q, out [image, token, head, HEAD_QUADS]; k, v [image, key, head, HEAD_QUADS], in Quads.
// For drivers whose subgroups have 8 lanes (software). A subgroup owns QUERIES queries of one head and walks the keys in
// tiles of 32: for the scores lane l holds the keys l, l+8, l+16, l+24; for the sums it holds the quads l, l+8, ... of v.
// Preconditions: subgroups of 8 lanes; QUERIES <= 8.

const PASSES = (HEAD_QUADS + 7u) / 8u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let lane = index % 8u;
  let q0 = (group.x * (WORKGROUP / 8u) + index / 8u) * QUERIES;
  if (q0 >= p.queries) { return; }
  let image = group.z;
  let head = group.y * HEAD_QUADS;
  let mine = min(q0 + lane % QUERIES, p.queries - 1u);
  let qBase = (image * p.queries + mine) * p.rowQuads + head;
  let kBase = image * p.keys * p.rowQuads + head;

  var top: array<f32, QUERIES>;
  var total: array<f32, QUERIES>;
  var sum: array<array<vec4f, PASSES>, QUERIES>;
  for (var i = 0u; i < QUERIES; i++) { top[i] = -3.0e38; }

  for (var j = 0u; j < p.keys; j += 32u) {
    // Spelled out: Dawn 0.6.2 zeroes a `var` without initializer once per function, not once per iteration.
    var s = array<vec4f, QUERIES>();
    var at = array<u32, 4>();
    for (var n = 0u; n < 4u; n++) { at[n] = kBase + min(j + n * 8u + lane, p.keys - 1u) * p.rowQuads; }
    for (var d = 0u; d < HEAD_QUADS; d++) {
      let a = load_q(qBase + d);
      let k0 = load_k(at[0] + d);
      let k1 = load_k(at[1] + d);
      let k2 = load_k(at[2] + d);
      let k3 = load_k(at[3] + d);
      for (var i = 0u; i < QUERIES; i++) {
        let b = subgroupShuffle(a, i);
        s[i] += vec4f(dot(b, k0), dot(b, k1), dot(b, k2), dot(b, k3));
      }
    }
    let valid = vec4u(j + lane) + vec4u(0u, 8u, 16u, 24u) < vec4u(p.keys);
    for (var i = 0u; i < QUERIES; i++) {
      let r = select(vec4f(-3.0e38), s[i] * p.scale, valid);
      let high = max(top[i], subgroupMax(max(max(r.x, r.y), max(r.z, r.w))));
      let shrink = exp(top[i] - high);
      top[i] = high;
      s[i] = select(vec4f(0.0), exp(r - high), valid);
      total[i] = total[i] * shrink + dot(s[i], vec4f(1.0));
      for (var c = 0u; c < PASSES; c++) { sum[i][c] *= shrink; }
    }
    for (var n = 0u; n < 4u; n++) {
      for (var l = 0u; l < 8u; l++) {
        let vBase = kBase + min(j + n * 8u + l, p.keys - 1u) * p.rowQuads;
        for (var c = 0u; c < PASSES; c++) {
          let value = load_v(vBase + min(c * 8u + lane, HEAD_QUADS - 1u));
          for (var i = 0u; i < QUERIES; i++) { sum[i][c] += value * subgroupShuffle(s[i][n], l); }
        }
      }
    }
  }

  for (var i = 0u; i < QUERIES; i++) {
    let norm = 1.0 / subgroupAdd(total[i]);
    for (var c = 0u; c < PASSES; c++) {
      let quad = c * 8u + lane;
      if (quad < HEAD_QUADS && q0 + i < p.queries) {
        save_out((image * p.queries + q0 + i) * p.rowQuads + head + quad, sum[i][c] * norm);
      }
    }
  }
}
