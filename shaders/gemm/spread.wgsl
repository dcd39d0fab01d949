// The inner product of the tiles of 32 rows for drivers whose subgroups have 8 lanes and where workgroup memory is slow
// (software). Lane l owns the rows l, l + 8, l + 16 and l + 24 of the tile and all of its columns; B is loaded once by the
// subgroup and spread by shuffles from constant lanes, which cost such a driver nothing.

// The lane's rows of the tile.
fn tileRows(m0: u32, lane: u32) -> vec4u { return vec4u(m0 + lane) + vec4u(0u, 8u, 16u, 24u); }

fn rowsAt(image: u32, m: vec4u) -> array<Row, 4> {
  return array(rowAt(image, m.x), rowAt(image, m.y), rowAt(image, m.z), rowAt(image, m.w));
}

fn seekRows(rows: array<Row, 4>, tap: u32) -> array<Source, 4> {
  return array(seek(rows[0], tap), seek(rows[1], tap), seek(rows[2], tap), seek(rows[3], tap));
}

// Values 4c .. 4c+3 of the lane's rows, a row of the matrix each.
fn loadRows(s: array<Source, 4>, c: u32) -> mat4x4f {
  return transpose(mat4x4f(loadA(s[0], c), loadA(s[1], c), loadA(s[2], c), loadA(s[3], c)));
}

// acc[c - first] (column: one of the 4 output columns of quad c; row: the lane's rows) += A B for one quad of k and the
// columns that the lanes first .. first + 3 hold: b[j] is row j of B in the lane's quad of columns.
fn outer(acc: ptr<function, array<mat4x4f, 4>>, a: mat4x4f, b: mat4x4f, first: u32) {
  for (var i = 0u; i < 4u; i++) {
    let b0 = subgroupShuffle(b[0], first + i);
    let b1 = subgroupShuffle(b[1], first + i);
    let b2 = subgroupShuffle(b[2], first + i);
    let b3 = subgroupShuffle(b[3], first + i);
    (*acc)[i] += a * transpose(mat4x4f(b0, b1, b2, b3));
  }
}
