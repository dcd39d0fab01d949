// out as broadcast32.wgsl makes it, of a 3x3 convolution of stride 1, with half as many products: Winograd's F(4, 3) along
// the rows of the image (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, section 4.3). Four neighbouring
// pixels of out, a run, are
//   A^T sum((G g) * (B^T d)), over the channels and the three rows of taps g, where d are the six pixels that g reaches:
// 6 products instead of 12. B^T d and G g are made from what is loaded; weights stay as they are packed, and nothing more
// is stored. W is packed [n / 32][tap][channel][32]. A subgroup is a workgroup and computes 8 runs x 32 columns: a lane owns a run
// and all of its columns. Two channels a turn, as the code of four is more than the instruction cache of most cores holds. Low-rank
// terms are sums of their own, of the pixels: as transformed sums they would take half as much code again.
// Preconditions: subgroups of 8 lanes; A is a_conv3.wgsl with stride 1, x read by pairs; no gates.

const RUN = 4u;

fn windowAt(row: Row, ky: u32) -> array<Source, 6> {
  return array(pixel(row, ky, 0u), pixel(row, ky, 1u), pixel(row, ky, 2u), pixel(row, ky, 3u), pixel(row, ky, 4u),
    pixel(row, ky, 5u));
}

// Values 2c and 2c + 1 of a pixel.
fn load2A(source: Source, c: u32) -> vec2f {
  return select(vec2f(0.0), load2_x(2u * source.base + c), source.inside);
}

// B^T d of those of a window's pixels.
fn inputTransform(window: array<Source, 6>, c: u32) -> array<vec2f, 6> {
  let d = array(load2A(window[0], c), load2A(window[1], c), load2A(window[2], c), load2A(window[3], c),
    load2A(window[4], c), load2A(window[5], c));
  let even = d[4] - 4.0 * d[2];
  let odd = d[3] - 4.0 * d[1];
  let even2 = d[4] - d[2];
  let odd2 = 2.0 * (d[3] - d[1]);
  return array(4.0 * d[0] - 5.0 * d[2] + d[4], even + odd, even - odd, even2 + odd2, even2 - odd2,
    4.0 * d[1] - 5.0 * d[3] + d[5]);
}

// G g, its rows times 4, -6, -6, 24, 24 and 1, which A^T divides by.
fn weightTransform(g0: mat2x4f, g1: mat2x4f, g2: mat2x4f) -> array<mat2x4f, 6> {
  let even = g0 + g2;
  let even2 = g0 + 4.0 * g2;
  let odd2 = 2.0 * g1;
  return array(g0, even + g1, even - g1, even2 + odd2, even2 - odd2, g2);
}

// A row of sums, by quads of columns.
alias Sums = array<vec4f, 8>;

// sums += b a for two k: b[j] is row j of B in the lane's quad of columns, spread to all lanes as in spread.wgsl.
fn outer2(sums: ptr<function, Sums>, a: vec2f, b: mat2x4f) {
  for (var i = 0u; i < 8u; i++) {
    (*sums)[i] += mat2x4f(subgroupShuffle(b[0], i), subgroupShuffle(b[1], i)) * a;
  }
}

fn outer4(sums: ptr<function, Sums>, a: vec4f, b: mat4x4f) {
  outer2(sums, a.xy, mat2x4f(b[0], b[1]));
  outer2(sums, a.zw, mat2x4f(b[2], b[3]));
}

// A^T s.
fn outputTransform(s: array<vec4f, 6>) -> array<vec4f, RUN> {
  let even = (s[1] + s[2]) / -6.0;
  let odd = (s[1] - s[2]) / -6.0;
  let even2 = (s[3] + s[4]) / 24.0;
  let odd2 = (s[3] - s[4]) / 12.0;
  return array(s[0] / 4.0 + even + even2, odd + odd2, even + 4.0 * even2, odd + 4.0 * odd2 + s[5]);
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let image = p.image0 + group.z;
  let panel = p.panel0 + group.x;
  let across = (p.outWidth + RUN - 1u) / RUN;
  let runs = p.m / p.outWidth * across;
  // Of the lane's run: the first pixel, and how many there are.
  let run = group.y * 8u + lane;
  let inside = min(run, runs - 1u);
  let column = inside % across * RUN;
  let m = inside / across * p.outWidth + column;
  let pixels = select(0u, min(p.outWidth - column, RUN), run < runs);
  let row = rowAt(image, m);
  var s0: Sums;
  var s1: Sums;
  var s2: Sums;
  var s3: Sums;
  var s4: Sums;
  var s5: Sums;

  let tap = p.kQuads * 32u;
  var w = group.x * TAPS * tap + lane;
  for (var ky = 0u; ky < 3u; ky++) {
    let window = windowAt(row, ky);
    for (var c = 0u; c < p.kQuads * 2u; c++) {
      let a = inputTransform(window, c);
      let b = weightTransform(load2_w(w), load2_w(w + tap), load2_w(w + 2u * tap));
      outer2(&s0, a[0], b[0]);
      outer2(&s1, a[1], b[1]);
      outer2(&s2, a[2], b[2]);
      outer2(&s3, a[3], b[3]);
      outer2(&s4, a[4], b[4]);
      outer2(&s5, a[5], b[5]);
      w += 16u;
    }
    w += 2u * tap;
  }

  var t0 = Sums();
  var t1 = Sums();
  var t2 = Sums();
  var t3 = Sums();
  let blocks = loraBlocks(image);
  let end = p.m - 1u;
  for (var half = 0u; half < blocks.y * 2u; half++) {
    let i = blocks.x + half / 2u;
    let h = half % 2u;
    let up = loraUp4(i, panel, h * 32u + lane);
    outer4(&t0, loraT(i, m, h), up);
    outer4(&t1, loraT(i, min(m + 1u, end), h), up);
    outer4(&t2, loraT(i, min(m + 2u, end), h), up);
    outer4(&t3, loraT(i, min(m + 3u, end), h), up);
  }

  // As in broadcast32.wgsl: compiled once, from a copy.
  let sums = array(s0, s1, s2, s3, s4, s5);
  let terms = array(t0, t1, t2, t3);
  for (var i = 0u; i < min(p.nQuads - panel * 8u, 8u); i++) {
    let y = outputTransform(array(sums[0][i], sums[1][i], sums[2][i], sums[3][i], sums[4][i], sums[5][i]));
    for (var o = 0u; o < pixels; o++) {
      var r = array<vec4f, PANELS>();
      r[0] = y[o] + terms[o][i];
      store(image, m + o, panel * 8u + i, r);
    }
  }
}
