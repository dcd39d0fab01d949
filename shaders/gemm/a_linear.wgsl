// A of a linear layer or a 1x1 convolution: x [image, m, k], rows contiguous.

const TAPS = 1u;

struct Row { base: u32 }

fn rowAt(image: u32, m: u32) -> Row { return Row((image * p.m + m) * p.kQuads); }

// Where a row is read for a tap: the row itself.
alias Source = Row;

fn seek(row: Row, tap: u32) -> Source { return row; }

// Values 4c .. 4c+3 of the row.
fn loadA(row: Source, c: u32) -> vec4f { return load_x(row.base + c); }
