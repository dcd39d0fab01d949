// The arithmetic peak of an adapter: eight independent chains of f32 fused multiply-adds an invocation, 16 links a round,
// in registers only. Flops of a round: 8 * 16 * 2. No part of any model; bench/peak.ts runs it.

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  // Values the compiler cannot know, close to 1 and 0, so that nothing folds or overflows.
  let m = 1.0 + f32(p.rounds) * 1e-12;
  let c = f32(id.x % 2u) * 1e-12;
  var a0 = c;
  var a1 = c + 1.0;
  var a2 = c + 2.0;
  var a3 = c + 3.0;
  var a4 = c + 4.0;
  var a5 = c + 5.0;
  var a6 = c + 6.0;
  var a7 = c + 7.0;
  for (var round = 0u; round < p.rounds; round++) {
    for (var link = 0u; link < 16u; link++) {
      a0 = fma(a0, m, c);
      a1 = fma(a1, m, c);
      a2 = fma(a2, m, c);
      a3 = fma(a3, m, c);
      a4 = fma(a4, m, c);
      a5 = fma(a5, m, c);
      a6 = fma(a6, m, c);
      a7 = fma(a7, m, c);
    }
  }
  out[id.x] = vec4f(a0 + a4, a1 + a5, a2 + a6, a3 + a7);
}
