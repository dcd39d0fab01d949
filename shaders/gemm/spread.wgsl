// The inner product of tiles for drivers whose subgroups have 8 lanes and where workgroup memory is slow (software). A lane
// owns some rows of the tile and all of its columns; B is loaded once by the subgroup and spread by shuffles from constant
// lanes, which cost such a driver nothing. Rows as in rows32.wgsl, which says how many a lane owns, OWNED, and how many quads of
// columns `outer` takes, SPREAD.

// A quad of each of the lane's rows: of k in A, of columns in the sums.
alias Rows = array<vec4f, OWNED>;

// acc[c - first] (the sums of quad c of the columns) += A B for one quad of k and the columns that the lanes
// first .. first + SPREAD - 1 hold: b[j] is row j of B in the lane's quad of columns.
fn outer(acc: ptr<function, array<Rows, SPREAD>>, a: Rows, b: mat4x4f, first: u32) {
  for (var i = 0u; i < SPREAD; i++) {
    let owner = first + i;
    let columns = transpose(mat4x4f(subgroupShuffle(b[0], owner), subgroupShuffle(b[1], owner),
      subgroupShuffle(b[2], owner), subgroupShuffle(b[3], owner)));
    for (var j = 0u; j < 4u; j++) {
      for (var v = 0u; v < OWNED; v++) { (*acc)[i][v][j] += dot(a[v], columns[j]); }
    }
  }
}
