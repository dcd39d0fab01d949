// T as lora_down.wgsl makes it, for drivers whose subgroups have 8 lanes: like broadcast.wgsl, with four blocks of an
// image for a panel. A subgroup computes 8 rows x 32 ranks: lane l loads row l of A and owns columns 4l .. 4l+3, which are
// half of block l / 2, so A is read once for four blocks. The last workgroup's lanes without a block repeat the last block;
// where it has only one, it is computed as lora_down.wgsl does it, twice as fast as with three quarters of the lanes idle.
// Workgroups past the image's number of blocks leave at once.
// Preconditions: subgroups of 8 lanes.

fn outer(acc: ptr<function, array<vec4f, 8>>, a: vec4f, b: array<vec4f, 4>) {
  for (var c = 0u; c < 4u; c++) {
    for (var m = 0u; m < 8u; m++) { (*acc)[m] += b[c] * subgroupShuffle(a[c], m); }
  }
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let image = group.z;
  let blocks = table[p.slotRow + image].zw;
  let first = group.x * 4u;
  if (first + 1u == blocks.y) {
    let rows0 = (group.y * WORKGROUP + index) * ROWS;
    if (rows0 < p.m) { downRows(table[blocks.x + first], image, rows0); }
    return;
  }
  let lane = index % 8u;
  let m0 = (group.y * (WORKGROUP / 8u) + index / 8u) * 8u;
  if (first >= blocks.y || m0 >= p.m) { return; }
  let mine = first + lane / 2u;
  let block = table[blocks.x + min(mine, blocks.y - 1u)];
  let row = rowAt(image, min(m0 + lane, p.m - 1u));
  var acc: array<vec4f, 8>;
  var d = block.x + lane % 2u;
  for (var tap = 0u; tap < TAPS; tap++) {
    let source = seek(row, tap);
    for (var c = 0u; c < p.kQuads; c++) {
      outer(&acc, loadA(source, c), array(load_down(d), load_down(d + 2u), load_down(d + 4u), load_down(d + 6u)));
      d += 8u;
    }
  }
  if (mine >= blocks.y) { return; }
  let scale = bitcast<f32>(block.z);
  for (var r = 0u; r < 8u; r++) {
    if (m0 + r < p.m) { t[(block.w * p.m + m0 + r) * 2u + lane % 2u] = scale * acc[r]; }
  }
}
