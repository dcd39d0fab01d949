// T[block, m, r] = scale * sum_k A[image, m, k] Down[r, k] for the 8 ranks r of one block of an image's stack; A as the
// layer itself sees it (linear, concat or convolution). A workgroup owns 64 rows, an invocation ROWS of them and the
// block's 8 columns: more rows read the same Down once (software drivers), fewer spread over more invocations (GPUs).
//   table as in lora_blocks.wgsl; down [k][8] in Quads at the block's down offset; t [T index][m][8] in f32.
// Workgroups past the image's number of blocks leave at once, so images with smaller stacks cost nothing.
// Precondition: ROWS divides 64.

@compute @workgroup_size(64u / ROWS)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let image = group.z;
  let blocks = table[p.slotRow + image].xy;
  let m0 = group.y * 64u + index * ROWS;
  if (group.x >= blocks.y || m0 >= p.m) { return; }
  let block = table[blocks.x + group.x];
  var acc: array<array<vec4f, 2>, ROWS>;
  var d = block.x;
  for (var tap = 0u; tap < TAPS; tap++) {
    var source = array<Source, ROWS>();
    for (var r = 0u; r < ROWS; r++) { source[r] = seek(rowAt(image, min(m0 + r, p.m - 1u)), tap); }
    for (var c = 0u; c < p.kQuads; c++) {
      var a = array<vec4f, ROWS>();
      for (var r = 0u; r < ROWS; r++) { a[r] = loadA(source[r], c); }
      for (var k = 0u; k < 4u; k++) {
        let b0 = load_down(d);
        let b1 = load_down(d + 1u);
        d += 2u;
        for (var r = 0u; r < ROWS; r++) {
          acc[r][0] += a[r][k] * b0;
          acc[r][1] += a[r][k] * b1;
        }
      }
    }
  }
  let scale = bitcast<f32>(block.z);
  for (var r = 0u; r < ROWS; r++) {
    if (m0 + r < p.m) {
      let at = (block.w * p.m + m0 + r) * 2u;
      t[at] = scale * acc[r][0];
      t[at + 1u] = scale * acc[r][1];
    }
  }
}
