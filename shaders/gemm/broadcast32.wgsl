// out[z, m, n] = epilogue(sum_k A[z, m, k] W[n, k] + sum_r T[z, m, r] Up[n, r]), one image per grid.z.
// W is packed [n / 32][k][32]. A subgroup is a workgroup and computes 32 rows x 32 columns, see spread.wgsl.
// Preconditions: subgroups of 8 lanes; kQuads even (channels are padded to 8).

alias Sources = array<Source, 4>;

fn seekRows(rows: array<Row, 4>, tap: u32) -> Sources {
  return Sources(seek(rows[0], tap), seek(rows[1], tap), seek(rows[2], tap), seek(rows[3], tap));
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let image = p.image0 + group.z;
  let panel = p.panel0 + group.x;
  let m = tileRows(group.y * 32u, lane);
  let inside = min(m, vec4u(p.m - 1u));
  let rows = array(rowAt(image, inside.x), rowAt(image, inside.y), rowAt(image, inside.z), rowAt(image, inside.w));
  var left: array<mat4x4f, 4>;
  var right: array<mat4x4f, 4>;

  var w = group.x * TAPS * p.kQuads * 32u + lane;
  for (var tap = 0u; tap < TAPS; tap++) {
    let s = seekRows(rows, tap);
    // One quad of k per turn: what is unrolled further takes longer to compile and runs no faster.
    for (var c = 0u; c < p.kQuads; c++) {
      let a = transpose(mat4x4f(loadA(s[0], c), loadA(s[1], c), loadA(s[2], c), loadA(s[3], c)));
      let b = mat4x4f(load_w(w), load_w(w + 8u), load_w(w + 16u), load_w(w + 24u));
      outer(&left, a, b, 0u);
      outer(&right, a, b, 4u);
      w += 32u;
    }
  }

  let blocks = loraBlocks(image);
  for (var half = 0u; half < blocks.y * 2u; half++) {
    let i = blocks.x + half / 2u;
    let h = half % 2u;
    let u = h * 32u + lane;
    let a = transpose(mat4x4f(loraT(i, inside.x, h), loraT(i, inside.y, h), loraT(i, inside.z, h), loraT(i, inside.w, h)));
    let b = mat4x4f(loraUp(i, panel, u), loraUp(i, panel, u + 8u), loraUp(i, panel, u + 16u), loraUp(i, panel, u + 24u));
    outer(&left, a, b, 0u);
    outer(&right, a, b, 4u);
  }

  // A loop whose end the compiler cannot see: the epilogue is compiled once. A copy, so that its index is not one of the
  // sums', which are registers only while every index is constant.
  let sums = array(left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]);
  let quads = min(p.nQuads - panel * 8u, 8u);
  for (var j = 0u; j < quads * 4u; j++) {
    let i = j / 4u;
    let v = j % 4u;
    store(image, m[v], panel * 8u + i, vec4f(sums[i][0][v], sums[i][1][v], sums[i][2][v], sums[i][3][v]));
  }
}
