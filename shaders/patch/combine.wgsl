// out[row, column] = keep * base[row, column] + scale * X[row, column] * Y[row % yRows, column % yColumns]: one step of
// patching a weight, all in f32. base is out itself where there is none, and not read where keep is 0; Y is 1 where there is
// none; X is what an x_ file says.
//   out, base [rows][columns]; y [yRows][yColumns] from word yAt on.
// An invocation owns four rows of one column.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let row = id.y * 4u;
  if (id.x >= p.columns || row >= p.rows) { return; }
  let x = p.scale * valuesX(row, id.x);
  let y0 = p.yAt + id.x % p.yColumns;
  for (var i = 0u; i < min(4u, p.rows - row); i++) {
    var v = x[i];
    if (HAS_y) { v *= y[y0 + (row + i) % p.yRows * p.yColumns]; }
    let at = (row + i) * p.columns + id.x;
    if (p.keep != 0.0) {
      if (HAS_base) { v += p.keep * base[at]; } else { v += p.keep * out[at]; }
    }
    out[at] = v;
  }
}
