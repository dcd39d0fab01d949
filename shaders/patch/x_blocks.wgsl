// X[row, column] = sum_r up[row, r] down[r, column] over `terms` blocks of 8 ranks, which lie one behind the other from quad
// xAt on, as gemm/lora_blocks.wgsl reads them: down [tap][stride channels][8], then up [panel][8][32].
// columnDiv is the number of taps: column = channel * columnDiv + tap. Precondition: row is a multiple of 4.

fn valuesX(row: u32, column: u32) -> vec4f {
  let k = column % p.columnDiv * p.stride + column / p.columnDiv;
  let downQuads = p.columnDiv * p.stride * 2u;
  let blockQuads = downQuads + (p.rows + 31u) / 32u * 64u;
  var v = vec4f(0.0);
  for (var block = 0u; block < p.terms; block++) {
    let at = p.xAt + block * blockQuads;
    let up = at + downQuads + row / 32u * 64u + row % 32u / 4u;
    let low = load_blocks(at + k * 2u);
    let high = load_blocks(at + k * 2u + 1u);
    for (var r = 0u; r < 4u; r++) {
      v += low[r] * load_blocks(up + r * 8u) + high[r] * load_blocks(up + (r + 4u) * 8u);
    }
  }
  return v;
}
