// Low-rank terms as extra K steps. Every adapter's rank is cut into blocks of 8 (zero padded); one image's stack is the
// list of all its blocks, so stacks, ranks and strengths are data and the rows of a batch may differ.
//   table[slotRow + image] = (first block, number of blocks, and the same of all layers that read the tensor, at the first
//                             of them: what lora_down.wgsl makes the T of)
//   table[block]           = (down offset, up offset, bits of the scale, index of the block's T)
//   up [panel][8][32] in Quads at the block's up offset; t [T index][m][8] in f32, already scaled.

// First block and number of blocks of this image.
fn loraBlocks(image: u32) -> vec2u { return table[p.slotRow + image].xy; }

// Quad `index` (k * 8 + column quad) of a panel of the block's up matrix.
fn loraUp(block: u32, panel: u32, index: u32) -> vec4f {
  return load_up(table[block].y + panel * 64u + index);
}

// The same for k .. k+3, one a column of the result.
fn loraUp4(block: u32, panel: u32, index: u32) -> mat4x4f {
  return mat4x4f(loraUp(block, panel, index), loraUp(block, panel, index + 8u), loraUp(block, panel, index + 16u),
    loraUp(block, panel, index + 24u));
}

// Values 4*half .. 4*half+3 of row m of T.
fn loraT(block: u32, m: u32, half: u32) -> vec4f {
  return t[(table[block].w * p.m + m) * 2u + half];
}
