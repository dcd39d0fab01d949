// out[z, i, h, :] = sum_j softmax_j(scale * q[z, i, h, :] . k[z, j, h, :]) v[z, j, h, :], streamed over j, for head widths
// that are no multiple of 4. q, out [image, token, head, HEAD_DIM]; k, v [image, key, head, HEAD_DIM], in Quads.
// An invocation owns one query of the fewest heads (1, 2 or 4) that fill whole quads, so no quad has two writers.
// Precondition: heads * HEAD_DIM is a multiple of 4.

fn qAt(i: u32) -> f32 { return load_q(i / 4u)[i % 4u]; }
fn kAt(i: u32) -> f32 { return load_k(i / 4u)[i % 4u]; }
fn vAt(i: u32) -> f32 { return load_v(i / 4u)[i % 4u]; }

const HEADS = select(select(1u, 2u, HEAD_DIM % 4u == 2u), 4u, HEAD_DIM % 2u == 1u);

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= p.queries) { return; }
  let width = p.rowQuads * 4u;
  var quad: vec4f;
  for (var h = 0u; h < HEADS; h++) {
    let head = (id.y * HEADS + h) * HEAD_DIM;
    if (head >= width) { return; }
    let qBase = (id.z * p.queries + id.x) * width + head;
    let kBase = id.z * p.keys * width + head;
    // Spelled out: Dawn 0.6.2 zeroes a `var` without initializer once per function, not once per iteration.
    var sum = array<f32, HEAD_DIM>();
    var top = -3.0e38;
    var total = 0.0;
    for (var j = 0u; j < p.keys; j++) {
      var score = 0.0;
      for (var d = 0u; d < HEAD_DIM; d++) { score += qAt(qBase + d) * kAt(kBase + j * width + d); }
      score *= p.scale;
      let high = max(top, score);
      let shrink = exp(top - high);
      let weight = exp(score - high);
      top = high;
      total = total * shrink + weight;
      for (var d = 0u; d < HEAD_DIM; d++) { sum[d] = sum[d] * shrink + weight * vAt(kBase + j * width + d); }
    }
    for (var d = 0u; d < HEAD_DIM; d++) {
      quad[(qBase + d) % 4u] = sum[d] / total;
      if ((qBase + d) % 4u == 3u) { save_out((qBase + d) / 4u, quad); }
    }
  }
}
