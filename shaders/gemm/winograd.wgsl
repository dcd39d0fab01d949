// out as broadcast32.wgsl makes it, of a 3x3 convolution of stride 1, with half as many products: Winograd's F(4, 3) along
// the rows of the image (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, section 4.3). Four neighbouring
// pixels of out, a run, are
//   A^T sum((G g) * (B^T d)), over the channels and the three rows of taps g, where d are the six pixels that g reaches:
// 6 products instead of 12. B^T d and G g are made from what is loaded; weights stay as they are packed, and nothing more
// is stored. W is packed [n / 32][tap][channel][32]. A subgroup is a workgroup and computes 16 runs x 32 columns: lane l owns
// the runs l and l + 8, see spread.wgsl. Low-rank terms are sums of their own, of the pixels: as transformed sums they would
// take half as much code again.
// Preconditions: subgroups of 8 lanes; A is a_conv3.wgsl with stride 1; no gates.

const RUNS = 2u;
const OWNED = RUNS;
const SPREAD = 8u;
const RUN = 4u;

fn windowAt(row: Row, ky: u32) -> array<Source, 6> {
  return array(pixel(row, ky, 0u), pixel(row, ky, 1u), pixel(row, ky, 2u), pixel(row, ky, 3u), pixel(row, ky, 4u),
    pixel(row, ky, 5u));
}

// B^T d of the values 4c .. 4c+3 of a window's pixels.
fn inputTransform(window: array<Source, 6>, c: u32) -> array<vec4f, 6> {
  let d = array(loadA(window[0], c), loadA(window[1], c), loadA(window[2], c), loadA(window[3], c), loadA(window[4], c),
    loadA(window[5], c));
  let even = d[4] - 4.0 * d[2];
  let odd = d[3] - 4.0 * d[1];
  let even2 = d[4] - d[2];
  let odd2 = 2.0 * (d[3] - d[1]);
  return array(4.0 * d[0] - 5.0 * d[2] + d[4], even + odd, even - odd, even2 + odd2, even2 - odd2,
    4.0 * d[1] - 5.0 * d[3] + d[5]);
}

// G g, its rows times 4, -6, -6, 24, 24 and 1, which A^T divides by.
fn weightTransform(g0: mat4x4f, g1: mat4x4f, g2: mat4x4f) -> array<mat4x4f, 6> {
  let even = g0 + g2;
  let even2 = g0 + 4.0 * g2;
  let odd2 = 2.0 * g1;
  return array(g0, even + g1, even - g1, even2 + odd2, even2 - odd2, g2);
}

// A^T s.
fn outputTransform(s: array<vec4f, 6>) -> array<vec4f, RUN> {
  let even = (s[1] + s[2]) / -6.0;
  let odd = (s[1] - s[2]) / -6.0;
  let even2 = (s[3] + s[4]) / 24.0;
  let odd2 = (s[3] - s[4]) / 12.0;
  return array(s[0] / 4.0 + even + even2, odd + odd2, even + 4.0 * even2, odd + 4.0 * odd2 + s[5]);
}

// T of one pixel of each run.
fn loadT(block: u32, m: array<u32, RUNS>, pixel: u32, half: u32) -> Rows {
  var rows = Rows();
  for (var v = 0u; v < RUNS; v++) { rows[v] = loraT(block, min(m[v] + pixel, p.m - 1u), half); }
  return rows;
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let image = p.image0 + group.z;
  let panel = p.panel0 + group.x;
  let across = (p.outWidth + RUN - 1u) / RUN;
  let runs = p.m / p.outWidth * across;
  let first = group.y * 8u * RUNS + lane;
  // Of the lane's runs: the first pixel, and how many there are.
  var m = array<u32, RUNS>();
  var pixels = array<u32, RUNS>();
  var rows = array<Row, RUNS>();
  for (var v = 0u; v < RUNS; v++) {
    let run = first + 8u * v;
    let inside = min(run, runs - 1u);
    let column = inside % across * RUN;
    m[v] = inside / across * p.outWidth + column;
    pixels[v] = select(0u, min(p.outWidth - column, RUN), run < runs);
    rows[v] = rowAt(image, m[v]);
  }
  var s0: array<Rows, SPREAD>;
  var s1: array<Rows, SPREAD>;
  var s2: array<Rows, SPREAD>;
  var s3: array<Rows, SPREAD>;
  var s4: array<Rows, SPREAD>;
  var s5: array<Rows, SPREAD>;

  let tap = p.kQuads * 32u;
  var w = group.x * TAPS * tap + lane;
  for (var ky = 0u; ky < 3u; ky++) {
    var windows = array<array<Source, 6>, RUNS>();
    for (var v = 0u; v < RUNS; v++) { windows[v] = windowAt(rows[v], ky); }
    for (var c = 0u; c < p.kQuads; c++) {
      var a = array<Rows, 6>();
      for (var v = 0u; v < RUNS; v++) {
        let d = inputTransform(windows[v], c);
        for (var k = 0u; k < 6u; k++) { a[k][v] = d[k]; }
      }
      let b = weightTransform(load4_w(w), load4_w(w + tap), load4_w(w + 2u * tap));
      outer(&s0, a[0], b[0], 0u);
      outer(&s1, a[1], b[1], 0u);
      outer(&s2, a[2], b[2], 0u);
      outer(&s3, a[3], b[3], 0u);
      outer(&s4, a[4], b[4], 0u);
      outer(&s5, a[5], b[5], 0u);
      w += 32u;
    }
    w += 2u * tap;
  }

  var t0 = array<Rows, SPREAD>();
  var t1 = array<Rows, SPREAD>();
  var t2 = array<Rows, SPREAD>();
  var t3 = array<Rows, SPREAD>();
  let blocks = loraBlocks(image);
  for (var half = 0u; half < blocks.y * 2u; half++) {
    let i = blocks.x + half / 2u;
    let h = half % 2u;
    let up = loraUp4(i, panel, h * 32u + lane);
    outer(&t0, loadT(i, m, 0u, h), up, 0u);
    outer(&t1, loadT(i, m, 1u, h), up, 0u);
    outer(&t2, loadT(i, m, 2u, h), up, 0u);
    outer(&t3, loadT(i, m, 3u, h), up, 0u);
  }

  // As in broadcast32.wgsl: compiled once, from a copy.
  let sums = array(s0, s1, s2, s3, s4, s5);
  let terms = array(t0, t1, t2, t3);
  let quads = min(p.nQuads - panel * 8u, 8u);
  for (var j = 0u; j < quads * RUNS; j++) {
    let i = j / RUNS;
    let v = j % RUNS;
    let y = outputTransform(array(sums[0][i][v], sums[1][i][v], sums[2][i][v], sums[3][i][v], sums[4][i][v],
      sums[5][i][v]));
    for (var o = 0u; o < pixels[v]; o++) {
      var r = array<vec4f, PANELS>();
      r[0] = y[o] + terms[o][i][v];
      store(image, m[v] + o, panel * 8u + i, r);
    }
  }
}
