// Two ways to the right factor of a GEMM on matrix units: out[m, n] = sum_k x[m, k] w[k, n], with w either loaded by the units
// straight from its buffer or, with STAGED, by way of workgroup memory as gemm/sgm.wgsl does. x lies [m][k], w in panels
// [n / 32][k][32], as factors both; out [m][n] in f32. A workgroup of 2x2 subgroups computes 64 x 64, a subgroup 32 x 32 of them.
// No part of any model; bench/matrix-peak.ts runs it. Preconditions: subgroups of LANES lanes; m and n multiples of 64, k of 32.

const SIDE = 64u;
const PART = 32u;
const WORKGROUP = 4u * LANES;
const DEPTH = 16u * PARTS;
const QUADS = DEPTH / 4u;
// One quad more than there are: rows one behind the other begin in different banks.
const A_STRIDE = QUADS + 1u;
const B_STRIDE = SIDE / 4u + 1u;
const DOWN = PART / MATRIX_M;
const ACROSS = PART / MATRIX_N;

alias Left = subgroup_matrix_left<Factor, MATRIX_K, MATRIX_M>;
alias Right = subgroup_matrix_right<Factor, MATRIX_N, MATRIX_K>;
alias Result = subgroup_matrix_result<f32, MATRIX_N, MATRIX_M>;

var<workgroup> tileA: array<vec4<Factor>, SIDE * A_STRIDE>;
var<workgroup> tileB: array<vec4<Factor>, DEPTH * B_STRIDE>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32) {
  let down = subgroup / 2u * PART;
  let across = subgroup % 2u * PART;
  let panel = group.x * 2u;
  var acc = array<array<Result, ACROSS>, DOWN>();
  for (var k0 = 0u; k0 < p.k; k0 += DEPTH) {
    workgroupBarrier();
    for (var i = index; i < SIDE * QUADS; i += WORKGROUP) {
      tileA[i / QUADS * A_STRIDE + i % QUADS] = x[((group.y * SIDE + i / QUADS) * p.k + k0) / 4u + i % QUADS];
    }
    if (STAGED) {
      for (var i = index; i < DEPTH * SIDE / 4u; i += WORKGROUP) {
        let column = i % 16u;
        tileB[i / 16u * B_STRIDE + column] = w[((panel + column / 8u) * p.k + k0 + i / 16u) * 8u + column % 8u];
      }
    }
    workgroupBarrier();
    for (var k = 0u; k < DEPTH; k += MATRIX_K) {
      var left = array<Left, DOWN>();
      for (var r = 0u; r < DOWN; r++) {
        left[r] = subgroupMatrixLoad<Left, row_major>(&tileA, (down + r * MATRIX_M) * A_STRIDE + k / 4u, A_STRIDE);
      }
      for (var c = 0u; c < ACROSS; c++) {
        var right: Right = Right();
        if (STAGED) {
          right = subgroupMatrixLoad<Right, row_major>(&tileB, k * B_STRIDE + (across + c * MATRIX_N) / 4u, B_STRIDE);
        } else {
          let at = ((panel + subgroup % 2u) * p.k + k0 + k) * 8u + c * MATRIX_N / 4u;
          right = subgroupMatrixLoad<Right, row_major>(&w, at, 8u);
        }
        for (var r = 0u; r < DOWN; r++) { acc[r][c] = subgroupMatrixMultiplyAccumulate(left[r], right, acc[r][c]); }
      }
    }
  }
  for (var r = 0u; r < DOWN; r++) {
    for (var c = 0u; c < ACROSS; c++) {
      let at = (group.y * SIDE + down + r * MATRIX_M) * p.n + group.x * SIDE + across + c * MATRIX_N;
      subgroupMatrixStore<row_major>(&out, at, acc[r][c], p.n);
    }
  }
}
