// out[z, m, n] = epilogue(sum_k A[z, m, k] W[n, k] + sum_r T[z, m, r] Up[n, r]), one image per grid.z.
// W is packed [n / 32][k][32]. For drivers whose subgroups have 8 lanes and where workgroup memory is slow (software).
// A subgroup computes 8 rows x 32 columns (with GATED, of the value panel and of its gates): lane l loads row l of A and owns
// columns 4l .. 4l+3; the values of A are spread by shuffles from a constant lane. A workgroup stacks its subgroups along m.
// Preconditions: subgroups of 8 lanes; kQuads even (channels are padded to 8).

fn outer(acc: ptr<function, array<vec4f, 8>>, a: vec4f, b: mat4x4f) {
  for (var c = 0u; c < 4u; c++) {
    for (var m = 0u; m < 8u; m++) { (*acc)[m] += b[c] * subgroupShuffle(a[c], m); }
  }
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let lane = index % 8u;
  let m0 = (group.y * (WORKGROUP / 8u) + index / 8u) * 8u;
  if (m0 >= p.m) { return; }
  let image = p.image0 + group.z;
  let panel = p.panel0 + group.x;
  let m = min(m0 + lane, p.m - 1u);
  let row = rowAt(image, m);
  var acc: array<vec4f, 8>;
  var gate: array<vec4f, 8>;

  let gates = p.panels * TAPS * p.kQuads * 32u;
  var b = group.x * TAPS * p.kQuads * 32u + lane;
  for (var tap = 0u; tap < TAPS; tap++) {
    let source = seek(row, tap);
    // One quad of k per turn: unrolled by two, lavapipe is 4 % (f16) to 40 % (f32) slower and compiles longer.
    for (var c = 0u; c < p.kQuads; c++) {
      let a = loadA(source, c);
      outer(&acc, a, load4_w(b));
      if (GATED) { outer(&gate, a, load4_w(b + gates)); }
      b += 32u;
    }
  }

  let blocks = loraBlocks(image);
  for (var half = 0u; half < blocks.y * 2u; half++) {
    let i = blocks.x + half / 2u;
    let u = half % 2u * 32u + lane;
    let a = loraT(i, m, half % 2u);
    outer(&acc, a, loraUp4(i, panel, u));
    if (GATED) { outer(&gate, a, loraUp4(i, panel + p.panels, u)); }
  }

  for (var r = 0u; r < 8u; r++) {
    var v = array<vec4f, PANELS>();
    v[0] = acc[r];
    if (GATED) { v[PANELS - 1u] = gate[r]; }
    store(image, m0 + r, panel * 8u + lane, v);
  }
}
