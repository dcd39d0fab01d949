// A of a 1x1 convolution over two tensors side by side: the first 4*split channels come from x, the rest from x2;
// the concatenated tensor is never made.

const TAPS = 1u;

struct Row { base: u32, base2: u32 }

fn rowAt(image: u32, m: u32) -> Row {
  let at = image * p.m + m;
  return Row(at * p.split, at * (p.kQuads - p.split));
}

// Where a row is read for a tap: the row itself.
alias Source = Row;

fn seek(row: Row, tap: u32) -> Source { return row; }

fn loadA(row: Source, c: u32) -> vec4f {
  if (c < p.split) { return load_x(row.base + c); }
  return load_x2(row.base2 + c - p.split);
}
