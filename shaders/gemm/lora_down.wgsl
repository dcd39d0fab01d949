// T[block, m, r] = scale * sum_k A[image, m, k] Down[r, k] for the 8 ranks r of one block of an image; A as the layer
// itself sees it (linear, concat or convolution). The blocks are those of all layers that read A. A workgroup owns 64 rows
// of one block, an invocation ROWS of them: more rows read the same Down once (software drivers), fewer spread over more
// invocations (GPUs).
//   table as in lora_blocks.wgsl; down [k][8] in Quads at the block's down offset; t [T index][m][8] in f32.
// Workgroups past the image's number of blocks leave at once, so images with smaller stacks cost nothing.
// Precondition: ROWS divides 64.

@compute @workgroup_size(64u / ROWS)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
  let image = group.z;
  let blocks = table[p.slotRow + image].zw;
  let m0 = group.y * 64u + index * ROWS;
  if (group.x >= blocks.y || m0 >= p.m) { return; }
  downRows(table[blocks.x + group.x], image, m0);
}
