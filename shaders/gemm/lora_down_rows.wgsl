// T of one block for ROWS rows of an image: an invocation computes all 8 columns of its rows, so that Down is read once
// for them (see lora_down.wgsl for the formula and layouts).

fn downRows(block: vec4u, image: u32, m0: u32) {
  var acc: array<array<vec4f, 2>, ROWS>;
  var d = block.x;
  for (var tap = 0u; tap < TAPS; tap++) {
    var source = array<Source, ROWS>();
    for (var r = 0u; r < ROWS; r++) { source[r] = seek(rowAt(image, min(m0 + r, p.m - 1u)), tap); }
    for (var c = 0u; c < p.kQuads; c++) {
      var a = array<vec4f, ROWS>();
      for (var r = 0u; r < ROWS; r++) { a[r] = loadA(source[r], c); }
      for (var k = 0u; k < 4u; k++) {
        let b0 = load_down(d);
        let b1 = load_down(d + 1u);
        d += 2u;
        for (var r = 0u; r < ROWS; r++) {
          acc[r][0] += a[r][k] * b0;
          acc[r][1] += a[r][k] * b1;
        }
      }
    }
  }
  let scale = bitcast<f32>(block.z);
  for (var r = 0u; r < ROWS; r++) {
    if (m0 + r < p.m) {
      let at = (block.w * p.m + m0 + r) * 2u;
      t[at] = scale * acc[r][0];
      t[at + 1u] = scale * acc[r][1];
    }
  }
}
