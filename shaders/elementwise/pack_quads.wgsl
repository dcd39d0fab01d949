// Into Quads of the storage dtype (lib/w_quads.wgsl).

alias Weights = Quad;

const K_EACH = 1u;

fn packColumns(panel: u32, k: u32, q: u32) {
  out[((p.outPanel + panel) * p.taps * p.paddedChannels + k) * 8u + q] = enc(columns(panel, k, q));
}
