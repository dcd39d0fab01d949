// The arithmetic peak of an adapter's matrix units: eight independent chains of products a subgroup, added in f32, operands
// in registers only. Flops of a round and subgroup: 8 * 2 * MATRIX_M * MATRIX_N * MATRIX_K. No part of any model;
// bench/matrix-peak.ts runs it. Preconditions: subgroups of LANES lanes.

const SUBGROUPS = 4u;
const WORKGROUP = SUBGROUPS * LANES;
const LEFTS = 2u;
const RIGHTS = 4u;
const LEFT = MATRIX_M * MATRIX_K;
const RIGHT = MATRIX_N * MATRIX_K;
const RESULT = MATRIX_M * MATRIX_N;

alias Left = subgroup_matrix_left<Factor, MATRIX_K, MATRIX_M>;
alias Right = subgroup_matrix_right<Factor, MATRIX_N, MATRIX_K>;
alias Result = subgroup_matrix_result<f32, MATRIX_N, MATRIX_M>;

var<workgroup> factors: array<Factor, LEFTS * LEFT + RIGHTS * RIGHT>;
var<workgroup> sums: array<f32, SUBGROUPS * RESULT>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32) {
  // No two operands are alike, so that no two chains are.
  for (var i = index; i < LEFTS * LEFT + RIGHTS * RIGHT; i += WORKGROUP) {
    factors[i] = Factor(f32(i % 61u) / 61.0 - 0.5);
  }
  workgroupBarrier();
  var left = array<Left, LEFTS>();
  var right = array<Right, RIGHTS>();
  for (var i = 0u; i < LEFTS; i++) { left[i] = subgroupMatrixLoad<Left, row_major>(&factors, i * LEFT, MATRIX_K); }
  for (var i = 0u; i < RIGHTS; i++) {
    right[i] = subgroupMatrixLoad<Right, row_major>(&factors, LEFTS * LEFT + i * RIGHT, MATRIX_N);
  }
  var acc = array<array<Result, RIGHTS>, LEFTS>();
  for (var round = 0u; round < p.rounds; round++) {
    for (var l = 0u; l < LEFTS; l++) {
      for (var r = 0u; r < RIGHTS; r++) { acc[l][r] = subgroupMatrixMultiplyAccumulate(left[l], right[r], acc[l][r]); }
    }
  }
  var total = 0.0;
  for (var l = 0u; l < LEFTS; l++) {
    for (var r = 0u; r < RIGHTS; r++) {
      workgroupBarrier();
      subgroupMatrixStore<row_major>(&sums, subgroup * RESULT, acc[l][r], MATRIX_N);
      workgroupBarrier();
      total += sums[index % (SUBGROUPS * RESULT)];
    }
  }
  out[group.x * WORKGROUP + index] = total;
}
