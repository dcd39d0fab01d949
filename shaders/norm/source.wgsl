// Where the two steps of a group norm read x: two tensors side by side, 4*split channels of x, the rest of x2 (absent: split =
// quads).

fn at(row: u32, quad: u32) -> vec4f {
  if (HAS_x2 && quad >= p.split) { return load_x2(row * (p.quads - p.split) + quad - p.split); }
  return load_x(row * p.split + quad);
}

// Rows of an image in its chunk: the first, and the one behind the last.
fn rowsOf(image: u32, chunk: u32) -> vec2u {
  let first = image * p.tokens + chunk * p.chunkTokens;
  return vec2u(first, min(first + p.chunkTokens, (image + 1u) * p.tokens));
}
