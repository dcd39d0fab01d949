// out[z, m, n] = epilogue(sum_j partials[z, j, m, n]), one image per grid.z: the end of a GEMM whose K was cut into p.kSplits
// parts, which are added in their order. Partials are f32, [image][part][m][columns of the layer]; with GATED these are twice
// the columns of out. A workgroup of 8x8 invocations computes 8 rows x 32 columns (a panel, from panel0 on), an invocation
// four of them.

@compute @workgroup_size(8, 8)
fn main(@builtin(global_invocation_id) at: vec3u) {
  let image = p.image0 + at.z;
  let quad = p.panel0 * 8u + at.x;
  if (at.y >= p.m || quad >= p.nQuads) { return; }
  let width = PANELS * p.nQuads;
  var start = (image * p.kSplits * p.m + at.y) * width + quad;
  var sum = array<vec4f, PANELS>();
  for (var j = 0u; j < p.kSplits; j++) {
    for (var i = 0u; i < PANELS; i++) { sum[i] += partials[start + i * p.nQuads]; }
    start += p.m * width;
  }
  store(image, at.y, quad, sum);
}
