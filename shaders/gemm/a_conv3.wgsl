// A of a 3x3 convolution with padding 1, as an implicit GEMM: row m is the output pixel (m / outWidth, m % outWidth),
// column k is (tap, channel), tap = 3 * ky + kx. x is [image, srcHeight, srcWidth, channel]. The convolution sees an
// image of inHeight x inWidth: the source itself, or the source scaled up to it by nearest neighbour.
// Precondition: inHeight >= srcHeight and inWidth >= srcWidth.

const TAPS = 9u;

struct Row { image: u32, y: i32, x: i32 }

struct Source { base: u32, inside: bool }

fn rowAt(image: u32, m: u32) -> Row {
  return Row(image, i32(m / p.outWidth * p.stride) - 1, i32(m % p.outWidth * p.stride) - 1);
}

// The pixel that far down and to the right of the upper left tap.
fn pixel(row: Row, down: u32, right: u32) -> Source {
  let y = row.y + i32(down);
  let x = row.x + i32(right);
  let inside = y >= 0 && x >= 0 && y < i32(p.inHeight) && x < i32(p.inWidth);
  let sy = select(0u, u32(y) * p.srcHeight / p.inHeight, inside);
  let sx = select(0u, u32(x) * p.srcWidth / p.inWidth, inside);
  return Source(((row.image * p.srcHeight + sy) * p.srcWidth + sx) * p.kQuads, inside);
}

fn seek(row: Row, tap: u32) -> Source { return pixel(row, tap / 3u, tap % 3u); }

fn loadA(source: Source, c: u32) -> vec4f {
  return select(vec4f(0.0), load_x(source.base + c), source.inside);
}
