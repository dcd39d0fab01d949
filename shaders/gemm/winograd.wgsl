// out as broadcast32.wgsl makes it, of a 3x3 convolution of stride 1, with half as many products: Winograd's F(4, 3) along
// the rows of the image (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, section 4.3). Four neighbouring
// pixels of out, a run, are
//   A^T sum((G g) * (B^T d)), over the channels and the three rows of taps g, where d are the six pixels that g reaches:
// 6 products instead of 12. B^T d and G g are made from what is loaded; weights stay as they are packed, and nothing more
// is stored. W is packed [n / 32][tap][channel][32]. A subgroup is a workgroup and computes 16 runs x 32 columns: lane l owns
// the runs l and l + 8, see spread.wgsl. Low-rank terms are added to the pixels: in the transformed sums they would take two
// thirds more code.
// Preconditions: subgroups of 8 lanes; A is a_conv3.wgsl with stride 1; no gates.

alias Rows = mat4x2f;

const SPREAD = 8u;
const RUN = 4u;

fn windowAt(row: Row, ky: u32) -> array<Source, 6> {
  return array(pixel(row, ky, 0u), pixel(row, ky, 1u), pixel(row, ky, 2u), pixel(row, ky, 3u), pixel(row, ky, 4u),
    pixel(row, ky, 5u));
}

// Values 4c .. 4c+3 of one pixel of the windows of both runs.
fn loadPair(s: Source, s2: Source, c: u32) -> Rows { return transpose(mat2x4f(loadA(s, c), loadA(s2, c))); }

// B^T d.
fn inputTransform(d: array<Rows, 6>) -> array<Rows, 6> {
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

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let image = p.image0 + group.z;
  let panel = p.panel0 + group.x;
  let across = (p.outWidth + RUN - 1u) / RUN;
  let runs = p.m / p.outWidth * across;
  let run = vec2u(group.y * 16u + lane) + vec2u(0u, 8u);
  let inside = min(run, vec2u(runs - 1u));
  // The first pixels of the runs.
  let m = inside / across * p.outWidth + inside % across * RUN;
  let row = rowAt(image, m.x);
  let row2 = rowAt(image, m.y);
  var s0: array<Rows, 8>;
  var s1: array<Rows, 8>;
  var s2: array<Rows, 8>;
  var s3: array<Rows, 8>;
  var s4: array<Rows, 8>;
  var s5: array<Rows, 8>;

  let tap = p.kQuads * 32u;
  var w = group.x * TAPS * tap + lane;
  for (var ky = 0u; ky < 3u; ky++) {
    let near = windowAt(row, ky);
    let far = windowAt(row2, ky);
    for (var c = 0u; c < p.kQuads; c++) {
      let a = inputTransform(array(loadPair(near[0], far[0], c), loadPair(near[1], far[1], c),
        loadPair(near[2], far[2], c), loadPair(near[3], far[3], c), loadPair(near[4], far[4], c),
        loadPair(near[5], far[5], c)));
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

  let blocks = loraBlocks(image);
  // As in broadcast32.wgsl: compiled once, from a copy.
  let sums = array(s0, s1, s2, s3, s4, s5);
  let quads = min(p.nQuads - panel * 8u, 8u);
  for (var j = 0u; j < quads * 2u; j++) {
    let i = j / 2u;
    let v = j % 2u;
    var s = array<vec4f, 6>();
    for (var k = 0u; k < 6u; k++) {
      s[k] = vec4f(sums[k][i][0][v], sums[k][i][1][v], sums[k][i][2][v], sums[k][i][3][v]);
    }
    var y = outputTransform(s);
    for (var half = 0u; half < blocks.y * 2u; half++) {
      let block = blocks.x + half / 2u;
      let h = half % 2u;
      let up = loraUp4(block, panel, h * 32u + i);
      for (var o = 0u; o < RUN; o++) { y[o] += up * loraT(block, min(m[v] + o, p.m - 1u), h); }
    }
    let pixels = select(0u, min(p.outWidth - inside[v] % across * RUN, RUN), run[v] < runs);
    for (var o = 0u; o < pixels; o++) {
      var r = array<vec4f, PANELS>();
      r[0] = y[o];
      store(image, m[v] + o, panel * 8u + i, r);
    }
  }
}
