// out[z, m, n] = epilogue(sum_k A[z, m, k] W[n, k] + sum_r T[z, m, r] Up[n, r]), one image per grid.z.
// W is packed [n / 32][k][32]. A subgroup is a workgroup and computes 32 rows x 32 columns, see spread.wgsl; with GATED, of
// the value panel and of its gates.
// Preconditions: subgroups of 8 lanes; kQuads even (channels are padded to 8).

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let image = p.image0 + group.z;
  let panel = p.panel0 + group.x;
  let m = tileRows(group.y * 32u, lane);
  let inside = min(m, vec4u(p.m - 1u));
  let rows = rowsAt(image, inside);
  var left: array<Rows, SPREAD>;
  var right: array<Rows, SPREAD>;
  var gateLeft: array<Rows, SPREAD>;
  var gateRight: array<Rows, SPREAD>;

  let gates = p.panels * TAPS * p.kQuads * 32u;
  var w = group.x * TAPS * p.kQuads * 32u + lane;
  for (var tap = 0u; tap < TAPS; tap++) {
    let s = seekRows(rows, tap);
    // One quad of k per turn: what is unrolled further takes longer to compile and runs no faster.
    for (var c = 0u; c < p.kQuads; c++) {
      let a = loadRows(s, c);
      let b = load4_w(w);
      outer(&left, a, b, 0u);
      outer(&right, a, b, 4u);
      if (GATED) {
        let g = load4_w(w + gates);
        outer(&gateLeft, a, g, 0u);
        outer(&gateRight, a, g, 4u);
      }
      w += 32u;
    }
  }

  let blocks = loraBlocks(image);
  for (var half = 0u; half < blocks.y * 2u; half++) {
    let i = blocks.x + half / 2u;
    let h = half % 2u;
    let a = Rows(loraT(i, inside.x, h), loraT(i, inside.y, h), loraT(i, inside.z, h), loraT(i, inside.w, h));
    let b = loraUp4(i, panel, h * 32u + lane);
    outer(&left, a, b, 0u);
    outer(&right, a, b, 4u);
    if (GATED) {
      let g = loraUp4(i, panel + p.panels, h * 32u + lane);
      outer(&gateLeft, a, g, 0u);
      outer(&gateRight, a, g, 4u);
    }
  }

  // A loop whose end the compiler cannot see: the epilogue is compiled once. Copies, so that its index is not one of the
  // sums', which are registers only while every index is constant.
  let sums = array(left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]);
  let gateSums = array(gateLeft[0], gateLeft[1], gateLeft[2], gateLeft[3], gateRight[0], gateRight[1], gateRight[2],
    gateRight[3]);
  let quads = min(p.nQuads - panel * 8u, 8u);
  for (var j = 0u; j < quads * 4u; j++) {
    let i = j / 4u;
    let v = j % 4u;
    var r = array<vec4f, PANELS>();
    r[0] = sums[i][v];
    if (GATED) { r[PANELS - 1u] = gateSums[i][v]; }
    store(image, m[v], panel * 8u + i, r);
  }
}
