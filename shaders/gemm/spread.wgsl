// The inner product of tiles for drivers whose subgroups have 8 lanes and where workgroup memory is slow (software). A lane
// owns some rows of the tile and all of its columns; B is loaded once by the subgroup and spread by shuffles from constant
// lanes, which cost such a driver nothing. Who uses it says what the lane's rows of one quad of k are, `Rows` (column: one k;
// row: one of the lane's rows), and how many quads of columns `outer` takes, SPREAD.

// acc[c - first] (column: one of the 4 output columns of quad c; row: the lane's rows) += A B for one quad of k and the
// columns that the lanes first .. first + SPREAD - 1 hold: b[j] is row j of B in the lane's quad of columns.
fn outer(acc: ptr<function, array<Rows, SPREAD>>, a: Rows, b: mat4x4f, first: u32) {
  for (var i = 0u; i < SPREAD; i++) {
    let b0 = subgroupShuffle(b[0], first + i);
    let b1 = subgroupShuffle(b[1], first + i);
    let b2 = subgroupShuffle(b[2], first + i);
    let b3 = subgroupShuffle(b[3], first + i);
    (*acc)[i] += a * transpose(mat4x4f(b0, b1, b2, b3));
  }
}
