// Rows of a weight mixed within blocks of `size`: with m in `blocks` [blocks][size][size], from word mAt on, and row(block, j) as below,
//   out[row(block, i)] = mix * sum_j m[block][i][j] w[row(block, j)] + (1 - mix) * w[row(block, i)].
// halves = 0: the rows of a block are neighbours (OFT). Else rows (a, c, b), b < halves, c < 2, are taken in the order (a, b, c),
// the butterfly of BOFT (Liu et al. 2023, arXiv 2311.06243). w and out [rows][columns] in f32.
// An invocation owns four rows of one column. Precondition: with halves, size is even and divides 2 * halves.

// Row of place j: even places lie one behind the other, and so do odd ones.
fn rowOf(first: u32, j: u32) -> u32 {
  if (p.halves == 0u) { return first + j; }
  return first + j % 2u * p.halves + j / 2u;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= p.columns) { return; }
  let quads = (p.size + 3u) / 4u;
  let block = id.y / quads;
  let i = id.y % quads * 4u;
  let t = block * p.size;
  var first = t;
  if (p.halves > 0u) { first = t / (2u * p.halves) * 2u * p.halves + t % (2u * p.halves) / 2u; }
  let m = p.mAt + t * p.size;
  var sum = vec4f(0.0);
  for (var j = 0u; j < p.size; j++) {
    let v = w[rowOf(first, j) * p.columns + id.x];
    for (var r = 0u; r < 4u; r++) { sum[r] += blocks[m + min(i + r, p.size - 1u) * p.size + j] * v; }
  }
  for (var r = 0u; r < min(4u, p.size - i); r++) {
    let at = rowOf(first, i + r) * p.columns + id.x;
    out[at] = p.mix * sum[r] + (1.0 - p.mix) * w[at];
  }
}
