// out[z, i, h, :] = sum_j softmax_j(scale * q[z, i, h, :] . k[z, j, h, :]) v[z, j, h, :], streamed over j: the scores are
// never stored (online softmax: Milakov and Gimelshein 2018; FlashAttention 2, Dao 2023).
//   q, out [image, token, head, HEAD_QUADS]; k, v [image, key, head, HEAD_QUADS], in Quads.
// For drivers whose subgroups have 8 lanes (software). A subgroup owns 32 queries of one head, four a lane: a vec4f holds
// one value of each of the four, a mat4x4f one quad of channels (its columns). It walks the keys in tiles of TILE_KEYS;
// the lanes load a tile's quads once, in order, and spread them by shuffles from a constant lane. A loaded vector costs
// such a driver as much as tens of multiply-adds, hence so many queries; what a loop carries is masked at every turn,
// hence several keys a turn, but no more than leave its code in the instruction cache.
// Preconditions: subgroups of 8 lanes; TILE_KEYS a power of two up to 8; TILE_KEYS * HEAD_QUADS at most 40.

const TILE_QUADS = TILE_KEYS * HEAD_QUADS;
// Loads a lane of a tile; in the last, some lanes may have none.
const LOADS = (TILE_QUADS + 7u) / 8u;
const LOWEST = -3.0e38;
// Weights are relative to a reference that the largest score so far exceeds by at most this: they stay below e^8, and the
// sums are rescaled a few times in all instead of at every tile.
const SLACK = 8.0;

alias Tile = array<vec4f, LOADS>;
alias Scores = array<vec4f, TILE_KEYS>;
alias Rows = array<mat4x4f, HEAD_QUADS>;

// Adds what the quads of the load c contribute to the scores.
fn scoreLoad(s: ptr<function, Scores>, q: ptr<function, Rows>, k: ptr<function, Tile>, c: u32) {
  if (c >= LOADS) { return; }
  for (var at = c * 8u; at < min(c * 8u + 8u, TILE_QUADS); at++) {
    (*s)[at / HEAD_QUADS] += (*q)[at % HEAD_QUADS] * subgroupShuffle((*k)[c], at % 8u);
  }
}

// Loads are called for by name: lavapipe unrolls no loop past 832 instructions in all, and an array indexed by anything but a
// constant costs it a gather an element.
fn score(s: ptr<function, Scores>, q: ptr<function, Rows>, k: ptr<function, Tile>) {
  scoreLoad(s, q, k, 0u);
  scoreLoad(s, q, k, 1u);
  scoreLoad(s, q, k, 2u);
  scoreLoad(s, q, k, 3u);
  scoreLoad(s, q, k, 4u);
}

// Adds the weighted values of a tile to the c-th 8 / TILE_KEYS quads of the sums.
fn weighPart(sum: ptr<function, Rows>, weight: ptr<function, Scores>, v: ptr<function, Tile>, c: u32) {
  const PART = 8u / TILE_KEYS;
  for (var d = c * PART; d < min((c + 1u) * PART, HEAD_QUADS); d++) {
    var r = (*sum)[d];
    for (var n = 0u; n < TILE_KEYS; n++) {
      let at = n * HEAD_QUADS + d;
      let w = (*weight)[n];
      let b = subgroupShuffle((*v)[at / 8u], at % 8u);
      r += mat4x4f(w * b.x, w * b.y, w * b.z, w * b.w);
    }
    (*sum)[d] = r;
  }
}

fn weigh(sum: ptr<function, Rows>, weight: ptr<function, Scores>, v: ptr<function, Tile>) {
  weighPart(sum, weight, v, 0u);
  weighPart(sum, weight, v, 1u);
  weighPart(sum, weight, v, 2u);
  weighPart(sum, weight, v, 3u);
  weighPart(sum, weight, v, 4u);
}

// Whether the lane takes part in the load c; all do, without a condition, in whole ones.
fn loads(c: u32, lane: u32) -> bool { return (c + 1u) * 8u <= TILE_QUADS || c * 8u + lane < TILE_QUADS; }

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let head = group.y * HEAD_QUADS;
  let query = vec4u(group.x * 32u + lane) + vec4u(0u, 8u, 16u, 24u);
  let row = (group.z * p.queries + min(query, vec4u(p.queries - 1u))) * p.rowQuads + head;
  // Always HEAD_QUADS; a bound the compiler cannot see (through `min` it does) keeps these loops from being unrolled, and compiled
  // for long.
  let quads = select(0u, HEAD_QUADS, p.queries > 0u);
  var q: Rows;
  for (var d = 0u; d < quads; d++) {
    q[d] = p.scale * transpose(mat4x4f(load_q(row.x + d), load_q(row.y + d), load_q(row.z + d), load_q(row.w + d)));
  }

  let kBase = group.z * p.keys * p.rowQuads + head;
  // Quads past the last key are read as the last one: their weights are 0.
  let last = (p.keys - 1u) * p.rowQuads + HEAD_QUADS - 1u;
  var place: array<u32, LOADS>;
  for (var c = 0u; c < LOADS; c++) {
    let at = c * 8u + lane;
    place[c] = at / HEAD_QUADS * p.rowQuads + at % HEAD_QUADS;
  }
  var sum: Rows;
  var total = vec4f(0.0);
  var reference = vec4f(LOWEST);
  var high = reference;
  var j = 0u;
  loop {
    for (; j < p.keys; j += TILE_KEYS) {
      let start = j * p.rowQuads;
      // Spelled out: Dawn 0.6.2 zeroes a `var` without initializer once per function, not once per iteration.
      var tile = Tile();
      var s = Scores();
      for (var c = 0u; c < LOADS; c++) {
        if (loads(c, lane)) { tile[c] = load_k(kBase + min(start + place[c], last)); }
      }
      score(&s, &q, &tile);
      high = vec4f(LOWEST);
      for (var n = 0u; n < TILE_KEYS; n++) { high = max(high, select(vec4f(LOWEST), s[n], j + n < p.keys)); }
      // A lane's four are joined before the vote, which such a driver takes lane by lane.
      let over = high - reference;
      if (subgroupAny(max(max(over.x, over.y), max(over.z, over.w)) > SLACK)) { break; }
      for (var n = 0u; n < TILE_KEYS; n++) {
        s[n] = select(vec4f(0.0), exp(s[n] - reference), j + n < p.keys);
        total += s[n];
      }
      for (var c = 0u; c < LOADS; c++) {
        if (loads(c, lane)) { tile[c] = load_v(kBase + min(start + place[c], last)); }
      }
      weigh(&sum, &s, &tile);
    }
    if (j >= p.keys) { break; }
    // The tile at j outgrew the reference; it is scored again with the new one.
    let next = max(reference, high);
    let shrink = exp(reference - next);
    reference = next;
    total *= shrink;
    for (var d = 0u; d < HEAD_QUADS; d++) {
      let r = sum[d];
      sum[d] = mat4x4f(r[0] * shrink, r[1] * shrink, r[2] * shrink, r[3] * shrink);
    }
  }

  for (var d = 0u; d < quads; d++) {
    let r = sum[d];
    let mean = transpose(mat4x4f(r[0] / total, r[1] / total, r[2] / total, r[3] / total));
    for (var i = 0u; i < 4u; i++) {
      if (query[i] < p.queries) { save_out(row[i] + d, mean[i]); }
    }
  }
}
