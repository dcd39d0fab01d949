// T[block, m, r] = scale * sum_k A[image, m, k] Down[r, k] for the 8 ranks r of one block of an image's stack; A as the
// layer itself sees it (linear, concat or convolution). An invocation owns one row m and the block's 8 columns.
//   table as in lora_blocks.wgsl; down [k][8] in Quads at the block's down offset; t [T index][m][8] in f32.
// Workgroups past the image's number of blocks leave at once, so images with smaller stacks cost nothing.

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let image = group.z;
  let blocks = table[p.slotRow + image].xy;
  let m = group.y * 64u + index;
  if (group.x >= blocks.y || m >= p.m) { return; }
  let block = table[blocks.x + group.x];
  let row = rowAt(image, m);
  var acc: array<vec4f, 2>;
  var d = block.x;
  for (var tap = 0u; tap < TAPS; tap++) {
    let source = seek(row, tap);
    for (var c = 0u; c < p.kQuads; c++) {
      let a = loadA(source, c);
      for (var k = 0u; k < 4u; k++) {
        acc[0] += a[k] * dec(down[d]);
        acc[1] += a[k] * dec(down[d + 1u]);
        d += 2u;
      }
    }
  }
  let scale = bitcast<f32>(block.z);
  let at = (block.w * p.m + m) * 2u;
  t[at] = scale * acc[0];
  t[at + 1u] = scale * acc[1];
}
