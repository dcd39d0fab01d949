// The epilogue every GEMM variant ends with: out[image, m, n] = act(v + bias[n] + add[image, m or 0, n]).
// `quad` counts groups of four output columns; rows and columns past the end are dropped.

fn store(image: u32, m: u32, quad: u32, v: vec4f) {
  if (m >= p.m || quad >= p.nQuads) { return; }
  var r = v;
  if (HAS_bias) { r += bias[quad]; }
  if (HAS_add) { r += load_add(select(image, image * p.m + m, ADD_PER_ROW) * p.nQuads + quad); }
  if (SILU) { r = r / (1.0 + exp(-r)); }
  save_out((image * p.m + m) * p.nQuads + quad, r);
}
