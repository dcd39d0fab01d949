// The epilogue every GEMM variant ends with: out[image, m, n] = act(v + bias[n] + add[image, m or 0, n]).
// `quad` counts groups of four output columns; rows and columns past the end are dropped. Out and add lie in segments of
// columns, [segment][image, m][columns of a segment]: one segment of all columns, or several where layers share a tensor.
// With GATED a layer has twice the columns of out, value columns and behind them as many gates, panel beside panel:
//   out = act((v + bias[n]) * gelu(gate + bias[n + columns of out]) + add)

const PANELS = select(1u, 2u, GATED);

fn store(image: u32, m: u32, quad: u32, v: array<vec4f, PANELS>) {
  if (m >= p.m || quad >= p.nQuads) { return; }
  let row = image * p.m + m;
  var r = v[0];
  if (HAS_bias) { r += bias[quad]; }
  if (GATED) {
    var gate = v[PANELS - 1u];
    if (HAS_bias) { gate += bias[quad + p.nQuads]; }
    r = r * gate * phi(gate);
  }
  if (HAS_add) {
    r += load_add(quad / p.addQuads * p.addStride + select(image, row, ADD_PER_ROW) * p.addQuads + quad % p.addQuads);
  }
  if (SILU) { r = r / (1.0 + exp(-r)); }
  save_out(quad / p.segmentQuads * p.segmentStride + row * p.segmentQuads + quad % p.segmentQuads, r);
}
