// Tiles of 32 rows of A for spread.wgsl: lane l owns the rows l, l + 8, l + 16 and l + 24 of the tile.

const OWNED = 4u;
const SPREAD = 4u;

// The lane's rows of the tile.
fn tileRows(m0: u32, lane: u32) -> vec4u { return vec4u(m0 + lane) + vec4u(0u, 8u, 16u, 24u); }

fn rowsAt(image: u32, m: vec4u) -> array<Row, 4> {
  return array(rowAt(image, m.x), rowAt(image, m.y), rowAt(image, m.z), rowAt(image, m.w));
}

fn seekRows(rows: array<Row, 4>, tap: u32) -> array<Source, 4> {
  return array(seek(rows[0], tap), seek(rows[1], tap), seek(rows[2], tap), seek(rows[3], tap));
}

// Values 4c .. 4c+3 of the lane's rows.
fn loadRows(s: array<Source, 4>, c: u32) -> Rows {
  return Rows(loadA(s[0], c), loadA(s[1], c), loadA(s[2], c), loadA(s[3], c));
}
