// Packed weights w in blocks of 32 k x 32 columns, [n / 32][k / 32], 8.5 bits a weight: signed bytes in units of a scale for
// each column. A block is 68 vec4u:
//   vec4u 8i + q, i < 8: the word of component j holds the bytes of columns 4q .. 4q+3 at k = 4i + j, the first one lowest;
//   vec4u 64 + q / 2: the scales of columns 4q .. 4q+3 as halves, in components xy for even q and zw for odd.
// Four k of four columns are one load, which is what counts on software drivers. Precondition: K is a multiple of 32.

alias Weights = vec4u;

fn bytes(word: u32) -> vec4f {
  return vec4f(bitcast<vec4i>(vec4u(word) << vec4u(24u, 16u, 8u, 0u)) >> vec4u(24u));
}

fn scales(block: u32, q: u32) -> vec4f {
  let at = block * 68u + 64u + q / 2u;
  let c = q % 2u * 2u;
  return vec4f(unpack2x16float(w[at][c]), unpack2x16float(w[at][c + 1u]));
}

// Columns 4q .. 4q+3 of one k; at = (panel * K + k) * 8 + q.
fn load_w(at: u32) -> vec4f {
  let k = at / 8u % 32u;
  let q = at % 8u;
  return scales(at / 256u, q) * bytes(w[at / 256u * 68u + k / 4u * 8u + q][k % 4u]);
}

// The same for k and k + 1, one a column of the result. Precondition: k is even.
fn load2_w(at: u32) -> mat2x4f {
  let k = at / 8u % 32u;
  let q = at % 8u;
  let d = scales(at / 256u, q);
  let words = at / 256u * 68u + k / 4u * 8u + q;
  return mat2x4f(d * bytes(w[words][k % 4u]), d * bytes(w[words][k % 4u + 1u]));
}

// The same for k .. k+3. Precondition: k is a multiple of 4.
fn load4_w(at: u32) -> mat4x4f {
  let q = at % 8u;
  let d = scales(at / 256u, q);
  let words = w[at / 256u * 68u + at % 256u / 32u * 8u + q];
  return mat4x4f(d * bytes(words.x), d * bytes(words.y), d * bytes(words.z), d * bytes(words.w));
}
