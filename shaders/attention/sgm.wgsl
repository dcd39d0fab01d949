// out[z, i, h, :] = sum_j softmax_j(scale * q[z, i, h, :] . k[z, j, h, :]) v[z, j, h, :], streamed over j: the scores are
// never stored in a buffer (online softmax: Milakov and Gimelshein 2018; FlashAttention 2, Dao 2023).
//   q, out [image, token, head, HEAD_QUADS]; k, v [image, key, head, HEAD_QUADS], in Quads.
// For adapters with matrix units (subgroup matrices of MATRIX_M x MATRIX_N x MATRIX_K): a workgroup of four subgroups owns 64
// queries of one head, a subgroup 16 of them, whose q and sums stay in its matrices. It walks the keys in tiles of TILE_KEYS.
// A matrix shows no element, so scores become weights in workgroup memory, by rows.
// Preconditions: subgroups of LANES lanes, 8 to 64; MATRIX_M, _N and _K are 8 or 16; TILE_KEYS is 16 or 32, such that
// all of this takes no more workgroup memory than every adapter has (matrixKeys in kernels/attention.ts).

const LOWEST = -3.0e38;
// Weights are relative to a reference that the largest score so far exceeds by at most this: they stay below e^8, and the
// sums are rescaled a few times in all instead of at every tile.
const SLACK = 8.0;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32) {
  let head = group.y * HEAD_QUADS;
  let first = group.x * QUERIES;
  let own = subgroup * OWN;
  let kBase = group.z * p.keys * p.rowQuads + head;
  let qBase = group.z * p.queries * p.rowQuads + head;

  var q: array<array<Left, WIDTH / MATRIX_K>, DOWN>;
  for (var base = 0u; base < QUERIES; base += TILE_KEYS) {
    workgroupBarrier();
    for (var at = index; at < TILE_KEYS * HEAD_QUADS; at += WORKGROUP) {
      let row = min(first + base + at / HEAD_QUADS, p.queries - 1u);
      tile[at / HEAD_QUADS * STRIDE + at % HEAD_QUADS] = factor(load_q(qBase + row * p.rowQuads + at % HEAD_QUADS));
    }
    workgroupBarrier();
    if (own / TILE_KEYS == base / TILE_KEYS) {
      for (var r = 0u; r < DOWN; r++) {
        for (var d = 0u; d < WIDTH; d += MATRIX_K) {
          let at = (own % TILE_KEYS + r * MATRIX_M) * STRIDE + d / 4u;
          q[r][d / MATRIX_K] = subgroupMatrixLoad<Left, row_major>(&tile, at, STRIDE);
        }
      }
    }
  }

  var sums: Sums;
  var total: array<f32, ROWS>;
  var reference: array<f32, ROWS>;
  for (var j = 0u; j < p.keys; j += TILE_KEYS) {
    let k = fetch(false, kBase, j, index);
    workgroupBarrier();
    put(k, index);
    let v = fetch(true, kBase, j, index);
    workgroupBarrier();
    for (var n = 0u; n < TILE_KEYS; n += MATRIX_N) {
      var scores = array<Result, DOWN>();
      for (var d = 0u; d < WIDTH; d += MATRIX_K) {
        let right = subgroupMatrixLoad<Right, col_major>(&tile, n * STRIDE + d / 4u, STRIDE);
        for (var r = 0u; r < DOWN; r++) {
          scores[r] = subgroupMatrixMultiplyAccumulate(q[r][d / MATRIX_K], right, scores[r]);
        }
      }
      for (var r = 0u; r < DOWN; r++) {
        subgroupMatrixStore<row_major>(&rows, (own + r * MATRIX_M) * ROW_PAIRS + n / 2u, scores[r], ROW_PAIRS);
      }
    }
    workgroupBarrier();
    put(v, index);

    var weights = array<array<vec4f, ROW_QUADS>, ROWS>();
    var high = array<f32, ROWS>();
    for (var i = 0u; i < ROWS; i++) {
      high[i] = LOWEST;
      for (var n = 0u; n < TILE_KEYS / 4u; n++) {
        let keys = vec4u(j + n * 4u) + vec4u(0u, 1u, 2u, 3u);
        let s = select(vec4f(LOWEST), p.scale * quadOf(rowAt(index, i), n), keys < vec4u(p.keys));
        high[i] = max(high[i], max(max(s.x, s.y), max(s.z, s.w)));
        if (n / ROW_QUADS == index % SHARERS) { weights[i][n % ROW_QUADS] = s; }
      }
      if (j == 0u) { reference[i] = high[i]; }
      if (high[i] > reference[i] + SLACK) { atomicStore(&outgrown, j + 1u); }
    }
    if (workgroupUniformLoad(&outgrown) == j + 1u) {
      var shrink = array<f32, ROWS>();
      for (var i = 0u; i < ROWS; i++) {
        let next = max(reference[i], high[i]);
        shrink[i] = exp(reference[i] - next);
        reference[i] = next;
        total[i] *= shrink[i];
      }
      for (var column = 0u; column < WIDTH; column += 16u) {
        lay(&sums, own, column);
        workgroupBarrier();
        for (var i = 0u; i < ROWS; i++) {
          for (var c = index % SHARERS; c < 8u; c += SHARERS) {
            let at = rowAt(index, i) * ROW_PAIRS + c;
            rows[at] = bitcast<vec2u>(shrink[i] * bitcast<vec2f>(rows[at]));
          }
        }
        workgroupBarrier();
        lift(&sums, own, column);
        workgroupBarrier();
      }
    }
    for (var i = 0u; i < ROWS; i++) {
      for (var n = 0u; n < ROW_QUADS; n++) {
        let w = rounded(exp(weights[i][n] - reference[i]));
        total[i] += w.x + w.y + w.z + w.w;
        let pairs = pairsOf(w);
        for (var x = 0u; x < PAIRS; x++) {
          rows[rowAt(index, i) * ROW_PAIRS + (index % SHARERS * ROW_QUADS + n) * PAIRS + x] = pairs[x];
        }
      }
    }
    workgroupBarrier();
    for (var n = 0u; n < TILE_KEYS; n += MATRIX_K) {
      var left = array<Left, DOWN>();
      for (var r = 0u; r < DOWN; r++) {
        let at = (own + r * MATRIX_M) * ROW_PAIRS + n / 4u * PAIRS;
        left[r] = subgroupMatrixLoad<Left, row_major>(&rows, at, ROW_PAIRS);
      }
      for (var c = 0u; c < ACROSS; c++) {
        let right = subgroupMatrixLoad<Right, row_major>(&tile, n * STRIDE + c * MATRIX_N / 4u, STRIDE);
        for (var r = 0u; r < DOWN; r++) { sums[r][c] = subgroupMatrixMultiplyAccumulate(left[r], right, sums[r][c]); }
      }
    }
  }

  for (var i = 0u; i < ROWS; i++) {
    rows[rowAt(index, i) * ROW_PAIRS + TILE_KEYS / 2u + index % SHARERS] = vec2u(bitcast<u32>(total[i]), 0u);
  }
  for (var column = 0u; column < WIDTH; column += 16u) {
    workgroupBarrier();
    lay(&sums, own, column);
    workgroupBarrier();
    for (var at = index; at < QUERIES * 4u; at += WORKGROUP) {
      var whole = 0.0;
      for (var i = 0u; i < SHARERS; i++) { whole += bitcast<f32>(rows[at / 4u * ROW_PAIRS + TILE_KEYS / 2u + i].x); }
      let quad = column / 4u + at % 4u;
      let query = first + at / 4u;
      if (query < p.queries && quad < HEAD_QUADS) {
        save_out(qBase + query * p.rowQuads + quad, quadOf(at / 4u, at % 4u) / whole);
      }
    }
  }
}
