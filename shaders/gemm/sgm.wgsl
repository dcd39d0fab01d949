// out[z, m, n] = epilogue(sum_k A[z, m, k] W[n, k] + sum_r T[z, m, r] Up[n, r]), one image per grid.z; K may be cut (place.wgsl).
// W is packed [n / 32][k][32]. For adapters with matrix units (subgroup matrices of MATRIX_M x MATRIX_N x MATRIX_K): a
// workgroup of 2x2 subgroups computes 64 rows x 64 columns (two panels; with GATED one and its gates), a subgroup 32 x 32 of
// them. Slices of DEPTH k lie in workgroup memory as factors; the next one is read from the buffers while the matrix units
// multiply the last. Where a value takes two factors, a slice holds the first of DEPTH / 2 k and behind them the second, and
// both are multiplied by the same rows of B.
// Preconditions: subgroups of LANES lanes; LANES at least 4, at most 64; MATRIX_M, _N and _K are 8 or 16; kQuads even.

const SIDE = 64u;
const PART = 32u;
const WORKGROUP = 4u * LANES;
const DEPTH = 16u * PARTS;
const QUADS = DEPTH / 4u;
// 16 bytes more than there are: rows one behind the other begin in different banks.
const A_STRIDE = QUADS + PARTS;
const B_STRIDE = SIDE / 4u + PARTS;

alias Left = subgroup_matrix_left<Factor, MATRIX_K, MATRIX_M>;
alias Right = subgroup_matrix_right<Factor, MATRIX_N, MATRIX_K>;
alias Result = subgroup_matrix_result<f32, MATRIX_N, MATRIX_M>;

const DOWN = PART / MATRIX_M;
const ACROSS = PART / MATRIX_N;
// Matrices that are stored side by side in the epilogue, 16 columns.
const BESIDE = 16u / MATRIX_N;

// [row][quad of k] and [k][quad of columns], and in the epilogue [subgroup][row][quad of columns].
var<workgroup> tileA: array<vec4<Factor>, SIDE * A_STRIDE>;
var<workgroup> tileB: array<vec4<Factor>, DEPTH * B_STRIDE>;
var<workgroup> sums: array<vec4f, 16u * MATRIX_M>;

// What an invocation reads of a slice: quads of A in one column, and blocks of 4 k x 4 columns of B.
const A_EACH = SIDE * QUADS / WORKGROUP;
const B_BLOCKS = QUADS * SIDE / 4u;
const B_EACH = (B_BLOCKS + WORKGROUP - 1u) / WORKGROUP;

alias Sources = array<Source, A_EACH>;

struct Slice { a: array<vec4<Factor>, A_EACH>, b: array<array<vec4<Factor>, 4>, B_EACH> }

struct Tile { image: u32, row: u32, panels: vec2u, blocks: vec2u }

// Quads of k in a slice of a tap; tap TAPS stands for the low-rank terms.
fn quadsOf(tap: u32) -> u32 {
  return select(QUADS, QUADS / PARTS, tap == TAPS || WIDE_x || WIDE_x2);
}

fn rowOf(tile: Tile, index: u32, i: u32) -> u32 {
  return min(tile.row + index / QUADS + i * (WORKGROUP / QUADS), p.m - 1u);
}

fn seekRows(tile: Tile, index: u32, tap: u32) -> Sources {
  var sources: Sources;
  for (var i = 0u; i < A_EACH; i++) { sources[i] = seek(rowAt(tile.image, rowOf(tile, index, i)), tap); }
  return sources;
}

fn fetch(tile: Tile, index: u32, sources: Sources, tap: u32, step: u32) -> Slice {
  var slice: Slice;
  let quads = quadsOf(tap);
  let end = select(p.kQuads, tile.blocks.y * 2u, tap == TAPS);
  let c = step * quads + index % QUADS % quads;
  for (var i = 0u; i < A_EACH; i++) {
    var v = vec4f(0.0);
    if (c < end && tap < TAPS) { v = loadA(sources[i], c); }
    if (c < end && tap == TAPS) { v = loraT(tile.blocks.x + c / 2u, rowOf(tile, index, i), c % 2u); }
    if (quads == QUADS) { slice.a[i] = factor(v); }
    else if (index % QUADS < quads) { slice.a[i] = firstPart(v); }
    else { slice.a[i] = secondPart(v); }
  }
  for (var i = 0u; i < B_EACH; i++) {
    let block = index + i * WORKGROUP;
    let k = block / 16u;
    let at = step * quads + k;
    if (k >= quads) { break; }
    let panel = tile.panels[block % 16u / 8u];
    var v = mat4x4f();
    if (at < end && tap < TAPS) { v = load4_w(((panel * TAPS + tap) * p.kQuads + at) * 32u + block % 8u); }
    if (at < end && tap == TAPS) {
      v = loraUp4(tile.blocks.x + at / 2u, p.panel0 + panel, at % 2u * 32u + block % 8u);
    }
    for (var j = 0u; j < 4u; j++) { slice.b[i][j] = factor(v[j]); }
  }
  return slice;
}

fn put(slice: Slice, index: u32) {
  for (var i = 0u; i < A_EACH; i++) {
    tileA[(index / QUADS + i * (WORKGROUP / QUADS)) * A_STRIDE + index % QUADS] = slice.a[i];
  }
  for (var i = 0u; i < B_EACH; i++) {
    let block = index + i * WORKGROUP;
    if (block >= B_BLOCKS) { break; }
    for (var j = 0u; j < 4u; j++) { tileB[(block / 16u * 4u + j) * B_STRIDE + block % 16u] = slice.b[i][j]; }
  }
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32) {
  let place = placeOf(group);
  let panels = vec2u(panelOf(group.x, 0u), panelOf(group.x, 1u));
  let tile = Tile(place.image, place.m0, panels, loraBlocks(place.image));
  let down = subgroup / 2u * PART;
  let across = subgroup % 2u * PART;
  var acc: array<array<Result, ACROSS>, DOWN>;

  let tapSteps = (p.kQuads + quadsOf(0u) - 1u) / quadsOf(0u);
  let loraSteps = (tile.blocks.y * 2u + quadsOf(TAPS) - 1u) / quadsOf(TAPS);
  let steps = stepsOf(place, TAPS * tapSteps + loraSteps);
  var tap = min(steps.x / tapSteps, TAPS);
  var step = steps.x - tap * tapSteps;
  var sources = seekRows(tile, index, min(tap, TAPS - 1u));
  var slice = fetch(tile, index, sources, tap, step);
  for (var s = steps.x; s < steps.y; s++) {
    workgroupBarrier();
    put(slice, index);
    workgroupBarrier();
    let depth = quadsOf(tap) * 4u;
    step += 1u;
    if (tap < TAPS && step == tapSteps) {
      tap += 1u;
      step = 0u;
      if (tap < TAPS) { sources = seekRows(tile, index, tap); }
    }
    if (s + 1u < steps.y) { slice = fetch(tile, index, sources, tap, step); }
    for (var k = 0u; k < DEPTH; k += MATRIX_K) {
      var left = array<Left, DOWN>();
      for (var r = 0u; r < DOWN; r++) {
        left[r] = subgroupMatrixLoad<Left, row_major>(&tileA, (down + r * MATRIX_M) * A_STRIDE + k / 4u, A_STRIDE);
      }
      for (var c = 0u; c < ACROSS; c++) {
        let at = k % depth * B_STRIDE + (across + c * MATRIX_N) / 4u;
        let right = subgroupMatrixLoad<Right, row_major>(&tileB, at, B_STRIDE);
        for (var r = 0u; r < DOWN; r++) { acc[r][c] = subgroupMatrixMultiplyAccumulate(left[r], right, acc[r][c]); }
      }
    }
  }

  for (var r = 0u; r < DOWN; r++) {
    for (var c = 0u; c < ACROSS; c += BESIDE) {
      workgroupBarrier();
      for (var b = 0u; b < BESIDE; b++) {
        subgroupMatrixStore<row_major>(&sums, subgroup * MATRIX_M * 4u + b * MATRIX_N / 4u, acc[r][c + b], 4u);
      }
      workgroupBarrier();
      for (var i = index; i < 16u * MATRIX_M / PANELS; i += WORKGROUP) {
        // Of the subgroup `owner`, and with GATED of its neighbour, which has the gates.
        let owner = i / (4u * MATRIX_M) * PANELS;
        let at = i % (4u * MATRIX_M);
        var v = array<vec4f, PANELS>();
        for (var j = 0u; j < PANELS; j++) { v[j] = sums[(owner + j) * 4u * MATRIX_M + at]; }
        let panel = outPanelOf(group.x, owner % 2u);
        let m = tile.row + owner / 2u * PART + r * MATRIX_M + at / 4u;
        if (panel < p.panels) { store(place.slab, m, (p.panel0 + panel) * 8u + c * MATRIX_N / 4u + at % 4u, v); }
      }
    }
  }
}
