// out[z, i, h, :] = sum_j softmax_j(scale * q[z, i, h, :] . k[z, j, h, :]) v[z, j, h, :], streamed over j: the scores are
// never stored (online softmax: Milakov and Gimelshein 2018; FlashAttention 2, Dao 2023).
//   q, out [image, token, head, HEAD_QUADS]; k, v [image, key, head, HEAD_QUADS], in Quads.
// For drivers whose subgroups have 8 lanes (software). A subgroup owns GROUPS groups of 32 queries of one head, a lane four of
// each: a vec4f holds one value of each of the four, a mat4x4f one quad of channels (its columns). It walks the keys in tiles
// of TILE_KEYS; the lanes load a tile's quads once, in order, and spread them by shuffles from a constant lane. A loaded
// vector costs such a driver as much as tens of multiply-adds, hence so many queries; what a loop carries is masked at every
// turn, hence several keys a turn.
// Preconditions: subgroups of 8 lanes; TILE_KEYS a power of two up to 8; TILE_KEYS * HEAD_QUADS a multiple of 8, at
// most 80.

// Loads a lane of a tile.
const LOADS = TILE_KEYS * HEAD_QUADS / 8u;
const LOWEST = -3.0e38;
// Weights are relative to a reference that the largest score so far exceeds by at most this: they stay below e^8, and the
// sums are rescaled a few times in all instead of at every tile.
const SLACK = 8.0;

alias Tile = array<vec4f, LOADS>;
// Of each group: one value a query, one for each key of a tile, and a quad for each quad of channels.
alias Values = array<vec4f, GROUPS>;
alias Scores = array<vec4f, TILE_KEYS * GROUPS>;
alias Rows = array<mat4x4f, HEAD_QUADS * GROUPS>;

// Adds what the eight quads of the load c contribute to the scores.
fn scoreLoad(s: ptr<function, Scores>, q: ptr<function, Rows>, k: ptr<function, Tile>, c: u32) {
  if (c >= LOADS) { return; }
  for (var lane = 0u; lane < 8u; lane++) {
    let at = c * 8u + lane;
    let b = subgroupShuffle((*k)[c], lane);
    for (var g = 0u; g < GROUPS; g++) {
      (*s)[at / HEAD_QUADS * GROUPS + g] += (*q)[at % HEAD_QUADS * GROUPS + g] * b;
    }
  }
}

// Five loads, called for each by name: lavapipe unrolls no loop past 832 instructions in all, and an array indexed by anything
// but a constant costs it a gather an element.
fn score(s: ptr<function, Scores>, q: ptr<function, Rows>, k: ptr<function, Tile>, first: u32) {
  scoreLoad(s, q, k, first);
  scoreLoad(s, q, k, first + 1u);
  scoreLoad(s, q, k, first + 2u);
  scoreLoad(s, q, k, first + 3u);
  scoreLoad(s, q, k, first + 4u);
}

// Adds the weighted values of a tile to the c-th 8 / TILE_KEYS quads of the sums.
fn weighLoad(sum: ptr<function, Rows>, weight: ptr<function, Scores>, v: ptr<function, Tile>, c: u32) {
  if (c >= LOADS) { return; }
  for (var i = c * (8u / TILE_KEYS) * GROUPS; i < (c + 1u) * (8u / TILE_KEYS) * GROUPS; i++) {
    var r = (*sum)[i];
    for (var n = 0u; n < TILE_KEYS; n++) {
      let at = n * HEAD_QUADS + i / GROUPS;
      let w = (*weight)[n * GROUPS + i % GROUPS];
      let b = subgroupShuffle((*v)[at / 8u], at % 8u);
      r += mat4x4f(w * b.x, w * b.y, w * b.z, w * b.w);
    }
    (*sum)[i] = r;
  }
}

fn weigh(sum: ptr<function, Rows>, weight: ptr<function, Scores>, v: ptr<function, Tile>, first: u32) {
  weighLoad(sum, weight, v, first);
  weighLoad(sum, weight, v, first + 1u);
  weighLoad(sum, weight, v, first + 2u);
  weighLoad(sum, weight, v, first + 3u);
  weighLoad(sum, weight, v, first + 4u);
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let head = group.y * HEAD_QUADS;
  var query = array<vec4u, GROUPS>();
  var row = array<vec4u, GROUPS>();
  for (var g = 0u; g < GROUPS; g++) {
    query[g] = vec4u((group.x * GROUPS + g) * 32u + lane) + vec4u(0u, 8u, 16u, 24u);
    row[g] = (group.z * p.queries + min(query[g], vec4u(p.queries - 1u))) * p.rowQuads + head;
  }
  // Always HEAD_QUADS; a bound the compiler cannot see keeps these loops from being unrolled, and compiled for long.
  let quads = min(p.rowQuads, HEAD_QUADS);
  var q: Rows;
  for (var i = 0u; i < quads * GROUPS; i++) {
    let r = row[i % GROUPS] + i / GROUPS;
    q[i] = p.scale * transpose(mat4x4f(load_q(r.x), load_q(r.y), load_q(r.z), load_q(r.w)));
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
  var total = Values();
  var reference = Values();
  for (var g = 0u; g < GROUPS; g++) { reference[g] = vec4f(LOWEST); }
  var high = reference;
  var j = 0u;
  loop {
    for (; j < p.keys; j += TILE_KEYS) {
      let start = j * p.rowQuads;
      // Spelled out: Dawn 0.6.2 zeroes a `var` without initializer once per function, not once per iteration.
      var tile = Tile();
      var s = Scores();
      for (var c = 0u; c < LOADS; c++) { tile[c] = load_k(kBase + min(start + place[c], last)); }
      score(&s, &q, &tile, 0u);
      score(&s, &q, &tile, 5u);
      // A lane's queries are joined before the vote, which such a driver takes lane by lane.
      var over = vec4f(LOWEST);
      for (var g = 0u; g < GROUPS; g++) { high[g] = vec4f(LOWEST); }
      for (var i = 0u; i < TILE_KEYS * GROUPS; i++) {
        let g = i % GROUPS;
        high[g] = max(high[g], select(vec4f(LOWEST), s[i], j + i / GROUPS < p.keys));
      }
      for (var g = 0u; g < GROUPS; g++) { over = max(over, high[g] - reference[g]); }
      if (subgroupAny(max(max(over.x, over.y), max(over.z, over.w)) > SLACK)) { break; }
      for (var i = 0u; i < TILE_KEYS * GROUPS; i++) {
        let g = i % GROUPS;
        s[i] = select(vec4f(0.0), exp(s[i] - reference[g]), j + i / GROUPS < p.keys);
        total[g] += s[i];
      }
      for (var c = 0u; c < LOADS; c++) { tile[c] = load_v(kBase + min(start + place[c], last)); }
      weigh(&sum, &s, &tile, 0u);
      weigh(&sum, &s, &tile, 5u);
    }
    if (j >= p.keys) { break; }
    // The tile at j outgrew the reference; it is scored again with the new one.
    for (var g = 0u; g < GROUPS; g++) {
      let next = max(reference[g], high[g]);
      let shrink = exp(reference[g] - next);
      reference[g] = next;
      total[g] *= shrink;
      for (var i = g; i < HEAD_QUADS * GROUPS; i += GROUPS) {
        let r = sum[i];
        sum[i] = mat4x4f(r[0] * shrink, r[1] * shrink, r[2] * shrink, r[3] * shrink);
      }
    }
  }

  for (var i = 0u; i < quads * GROUPS; i++) {
    let r = sum[i];
    let n = total[i % GROUPS];
    let mean = transpose(mat4x4f(r[0] / n, r[1] / n, r[2] / n, r[3] / n));
    for (var j = 0u; j < 4u; j++) {
      if (query[i % GROUPS][j] < p.queries) { save_out(row[i % GROUPS][j] + i / GROUPS, mean[j]); }
    }
  }
}
