// Packed weights w as Quads of the storage dtype: [n / 32][k][32], so that a Quad is four neighbouring columns of one k.

alias Weights = Quad;

// Columns 4q .. 4q+3 of one k; at = (panel * K + k) * 8 + q.
fn load_w(at: u32) -> vec4f { return dec(w[at]); }

// The same for k and k + 1, one a column of the result. Precondition: k is even.
fn load2_w(at: u32) -> mat2x4f { return mat2x4f(load_w(at), load_w(at + 8u)); }

// The same for k .. k+3. Precondition: k is a multiple of 4.
fn load4_w(at: u32) -> mat4x4f {
  return mat4x4f(load_w(at), load_w(at + 8u), load_w(at + 16u), load_w(at + 24u));
}
