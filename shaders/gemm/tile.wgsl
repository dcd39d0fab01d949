// out[z, m, n] = epilogue(sum_k A[z, m, k] W[n, k] + sum_r T[z, m, r] Up[n, r]), one image per grid.z; K may be cut (place.wgsl).
// W is packed [n / 32][k][32]. For any GPU: a workgroup of 8x8 invocations computes 64 rows x 64 columns (two panels)
// from slices of 8 k in workgroup memory; an invocation keeps 8 rows x 8 columns in registers. With GATED the second panel
// has the gates of the first.
// Precondition: kQuads even (channels are padded to 8).

// [row][2 quads of k] and [k][16 quads of columns].
var<workgroup> tileA: array<vec4f, 128>;
var<workgroup> tileB: array<vec4f, 128>;

fn accumulate(acc: ptr<function, array<array<vec4f, 2>, 8>>, ty: u32, tx: u32) {
  // Always 2; a bound the compiler cannot see keeps software drivers from unrolling what takes them 9 s to compile.
  let quads = min(p.kQuads, 2u);
  for (var q = 0u; q < quads; q++) {
    var a = array<vec4f, 8>();
    for (var r = 0u; r < 8u; r++) { a[r] = tileA[(ty * 8u + r) * 2u + q]; }
    for (var c = 0u; c < 4u; c++) {
      let b0 = tileB[(q * 4u + c) * 16u + tx];
      let b1 = tileB[(q * 4u + c) * 16u + tx + 8u];
      for (var r = 0u; r < 8u; r++) {
        (*acc)[r][0] += a[r][c] * b0;
        (*acc)[r][1] += a[r][c] * b1;
      }
    }
  }
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let place = placeOf(group);
  let ty = index / 8u;
  let tx = index % 8u;
  // This invocation loads row `index` of A, and of B the quads `index` and `index + 64`: k = index / 16 (+ 4).
  let mine = min(place.m0 + index, p.m - 1u);
  let row = rowAt(place.image, mine);
  let localPanel = panelOf(group.x, index % 16u / 8u);
  let column = (index / 16u) * 8u + index % 8u;
  let panelStart = localPanel * TAPS * p.kQuads * 32u + column;
  var acc: array<array<vec4f, 2>, 8>;

  // The blocks of the low-rank terms are steps behind the last tap, so that `accumulate` is compiled once.
  let blocks = loraBlocks(place.image);
  let tapSteps = p.kQuads / 2u;
  let steps = stepsOf(place, TAPS * tapSteps + blocks.y);
  var tap = min(steps.x / tapSteps, TAPS);
  var step = steps.x - tap * tapSteps;
  var source = seek(row, min(tap, TAPS - 1u));
  for (var s = steps.x; s < steps.y; s++) {
    if (tap < TAPS) {
      let b = panelStart + s * 64u;
      tileA[index * 2u] = loadA(source, step * 2u);
      tileA[index * 2u + 1u] = loadA(source, step * 2u + 1u);
      tileB[index] = load_w(b);
      tileB[index + 64u] = load_w(b + 32u);
    } else {
      let block = blocks.x + step;
      tileA[index * 2u] = loraT(block, mine, 0u);
      tileA[index * 2u + 1u] = loraT(block, mine, 1u);
      tileB[index] = loraUp(block, p.panel0 + localPanel, column);
      tileB[index + 64u] = loraUp(block, p.panel0 + localPanel, column + 32u);
    }
    workgroupBarrier();
    accumulate(&acc, ty, tx);
    workgroupBarrier();
    step += 1u;
    if (tap < TAPS && step == tapSteps) {
      tap += 1u;
      step = 0u;
      source = seek(row, min(tap, TAPS - 1u));
    }
  }

  for (var r = 0u; r < 8u; r++) {
    for (var h = 0u; h < 2u; h += PANELS) {
      var v = array<vec4f, PANELS>();
      for (var i = 0u; i < PANELS; i++) { v[i] = acc[r][h + i]; }
      let at = outPanelOf(group.x, h);
      if (at < p.panels) { store(place.slab, place.m0 + ty * 8u + r, (p.panel0 + at) * 8u + tx, v); }
    }
  }
}
