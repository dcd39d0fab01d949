// What a weight-decomposed adapter multiplies rows or columns by: out[g] = magnitude[g] / (||w_g|| + eps), where w_g is the
// g-th row, or the g-th input channel, of w [rows][channels][taps] in f32, and eps that of f32. Value e of group g lies at
//   g * step + e / run * jump + e % run,
// so rows are step = run = columns, and channels step = run = taps with jump = columns. Each result is written `copies` times.
// magnitude from word magnitudeAt on. A workgroup owns one group.

var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var e = lane; e < p.count; e += 64u) {
    let v = w[group.x * p.step + e / p.run * p.jump + e % p.run];
    sum += v * v;
  }
  partial[lane] = sum;
  for (var width = 32u; width > 0u; width /= 2u) {
    workgroupBarrier();
    if (lane < width) { partial[lane] += partial[lane + width]; }
  }
  workgroupBarrier();
  let scale = magnitude[p.magnitudeAt + group.x] / (sqrt(partial[0]) + 1.1920929e-7);
  for (var i = lane; i < p.copies; i += 64u) { out[group.x * p.copies + i] = scale; }
}
