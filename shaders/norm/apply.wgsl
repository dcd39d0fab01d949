// Second step of a group norm: out[image, t, c] = act((x[image, t, c] - mean) / sqrt(var + eps) * gamma[c] + beta[c]) with mean
// and variance of c's group in the image, act = SiLU or none.
// x as in source.wgsl; out is one tensor, so what follows sees the concatenation. A workgroup owns LANES * COLUMNS octets of
// channels and a chunk of tokens: lane l the octets l, l + LANES, ... of each ROWS-th token. It folds the moments of the groups
// that its channels lie in; its invocations keep scale and shift of their octets.
// Precondition: channels = groups * groupChannels, a multiple of 8.

fn normed(x: vec4f, affine: Affine) -> vec4f {
  let v = x * affine.scale + affine.shift;
  if (SILU) { return v / (1.0 + exp(-v)); }
  return v;
}

@compute @workgroup_size(LANES, ROWS)
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_id) id: vec3u,
  @builtin(local_invocation_index) index: u32,
) {
  let image = p.image0 + group.z;
  let rows = rowsOf(image, group.y);
  let firstOctet = group.x * LANES * COLUMNS;
  let octets = p.quads / 2u;
  let affines = affinesOf(image, firstOctet, index);
  for (var row = rows[0] + id.y; row < rows[1]; row += ROWS) {
    for (var c = 0u; c < COLUMNS; c++) {
      let octet = firstOctet + id.x + c * LANES;
      let quad = 2u * min(octet, octets - 1u);
      let first = normed(at(row, quad), affines[c][0]);
      let second = normed(at(row, quad + 1u), affines[c][1]);
      if (octet < octets) { save8_out(row * octets + octet, array(first, second)); }
    }
  }
}
