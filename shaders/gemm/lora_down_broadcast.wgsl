// T as lora_down.wgsl makes it, for drivers whose subgroups have 8 lanes: like broadcast32.wgsl, with up to four blocks of an
// image for a panel. A subgroup is a workgroup and computes 32 rows x 32 ranks (or 16 where at most two blocks are left): lane
// l loads half of block l / 2, so A is read once for four blocks. Lanes without a block repeat the last one.
// Workgroups past the image's number of blocks leave at once.
// Preconditions: subgroups of 8 lanes.

// Ranks of the lane's half of a block, of k .. k+3, one a column of the matrix.
fn loadDown(d: u32) -> mat4x4f {
  return mat4x4f(load_down(d), load_down(d + 2u), load_down(d + 4u), load_down(d + 6u));
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let image = group.z;
  let blocks = table[p.slotRow + image].zw;
  let first = group.x * 4u;
  if (first >= blocks.y) { return; }
  let last = blocks.x + blocks.y - 1u;
  let wide = first + 2u < blocks.y;
  let m = tileRows(group.y * 32u, lane);
  let inside = min(m, vec4u(p.m - 1u));
  let rows = rowsAt(image, inside);
  var left: array<Rows, SPREAD>;
  var right: array<Rows, SPREAD>;

  var d = table[min(blocks.x + first + lane / 2u, last)].x + lane % 2u;
  for (var tap = 0u; tap < TAPS; tap++) {
    let s = seekRows(rows, tap);
    // Two loops of which one has no turns, and not a condition within one: such drivers run both sides of a condition.
    for (var c = 0u; c < select(p.kQuads, 0u, wide); c++) {
      outer(&left, loadRows(s, c), loadDown(d), 0u);
      d += 8u;
    }
    for (var c = 0u; c < select(0u, p.kQuads, wide); c++) {
      let a = loadRows(s, c);
      let b = loadDown(d);
      outer(&left, a, b, 0u);
      outer(&right, a, b, 4u);
      d += 8u;
    }
  }

  // As in broadcast32.wgsl: compiled once, from a copy.
  let sums = array(left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]);
  for (var j = 0u; j < min(blocks.y - first, 4u) * 8u; j++) {
    let i = j / 4u;
    let v = j % 4u;
    let block = table[blocks.x + first + i / 2u];
    let sum = sums[i][v];
    if (m[v] < p.m) { t[(block.w * p.m + m[v]) * 2u + i % 2u] = bitcast<f32>(block.z) * sum; }
  }
}
