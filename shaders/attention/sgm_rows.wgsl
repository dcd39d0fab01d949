// What sgm.wgsl keeps in matrices and in workgroup memory, and how it goes from one to the other and from the buffers.

const QUERIES = 64u;
const OWN = 16u;
const WORKGROUP = 4u * LANES;
// Heads are padded to whole matrices with the zeros that workgroup memory begins with.
const WIDTH = (HEAD_QUADS + 3u) / 4u * 16u;
// 16 bytes more than there are, and a pair for each invocation of a row: rows one behind the other begin in different banks.
const STRIDE = WIDTH / 4u + PARTS;
const ROW_PAIRS = TILE_KEYS / 2u + max(SHARERS, 2u);

alias Left = subgroup_matrix_left<Factor, MATRIX_K, MATRIX_M>;
alias Right = subgroup_matrix_right<Factor, MATRIX_N, MATRIX_K>;
alias Result = subgroup_matrix_result<f32, MATRIX_N, MATRIX_M>;

const DOWN = OWN / MATRIX_M;
const ACROSS = WIDTH / MATRIX_N;

alias Sums = array<array<Result, ACROSS>, DOWN>;

// q, k or v: [row][quad].
var<workgroup> tile: array<vec4<Factor>, TILE_KEYS * STRIDE>;
// [query][key]: scores in f32, then weights as factors; or 16 columns of the sums. Behind them what the invocations of a row
// add up of its weights.
var<workgroup> rows: array<vec2u, QUERIES * ROW_PAIRS>;
// The last tile that took a new reference, counted from 1.
var<workgroup> outgrown: atomic<u32>;

// Quads of a tile that an invocation reads, and what it has of the rows: all keys of several, or a part of one.
const EACH = (TILE_KEYS * HEAD_QUADS + WORKGROUP - 1u) / WORKGROUP;
const SHARERS = max(WORKGROUP / QUERIES, 1u);
const ROWS = max(QUERIES / WORKGROUP, 1u);
const ROW_QUADS = TILE_KEYS / 4u / SHARERS;

alias Piece = array<vec4<Factor>, EACH>;

fn fetch(isV: bool, base: u32, j: u32, index: u32) -> Piece {
  var piece: Piece;
  for (var i = 0u; i < EACH; i++) {
    let n = (index + i * WORKGROUP) / HEAD_QUADS;
    let at = base + min(j + n, p.keys - 1u) * p.rowQuads + (index + i * WORKGROUP) % HEAD_QUADS;
    if (isV) { piece[i] = factor(load_v(at)); } else { piece[i] = factor(load_k(at)); }
  }
  return piece;
}

fn put(piece: Piece, index: u32) {
  for (var i = 0u; i < EACH; i++) {
    let at = index + i * WORKGROUP;
    if (at < TILE_KEYS * HEAD_QUADS) { tile[at / HEAD_QUADS * STRIDE + at % HEAD_QUADS] = piece[i]; }
  }
}

fn rowAt(index: u32, i: u32) -> u32 { return index / SHARERS + i * (WORKGROUP / SHARERS); }

fn quadOf(row: u32, quad: u32) -> vec4f {
  let at = row * ROW_PAIRS + quad * 2u;
  return vec4f(bitcast<vec2f>(rows[at]), bitcast<vec2f>(rows[at + 1u]));
}

// 16 columns of the subgroup's sums between its matrices and its rows.
fn lay(sums: ptr<function, Sums>, own: u32, column: u32) {
  for (var r = 0u; r < DOWN; r++) {
    for (var c = 0u; c < 16u; c += MATRIX_N) {
      let at = (own + r * MATRIX_M) * ROW_PAIRS + c / 2u;
      subgroupMatrixStore<row_major>(&rows, at, (*sums)[r][(column + c) / MATRIX_N], ROW_PAIRS);
    }
  }
}

fn lift(sums: ptr<function, Sums>, own: u32, column: u32) {
  for (var r = 0u; r < DOWN; r++) {
    for (var c = 0u; c < 16u; c += MATRIX_N) {
      let at = (own + r * MATRIX_M) * ROW_PAIRS + c / 2u;
      (*sums)[r][(column + c) / MATRIX_N] = subgroupMatrixLoad<Result, row_major>(&rows, at, ROW_PAIRS);
    }
  }
}
