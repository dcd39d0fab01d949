// out[r, c] = x[r, c] * gelu(x[r, inner + c]). An invocation owns one quad of ROWS consecutive rows: starting one costs a
// software driver more than a quad.

const ROWS = 4u;

@compute @workgroup_size(16, 4)
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= p.quads) { return; }
  for (var i = 0u; i < ROWS; i++) {
    let row = id.y * ROWS + i;
    if (row < p.rows) {
      let base = row * 2u * p.quads + id.x;
      let gate = load_x(base + p.quads);
      save_out(row * p.quads + id.x, load_x(base) * gate * phi(gate));
    }
  }
}
