// Scale and shift of the channels of a workgroup: SLOTS invocations sum each of its groups, one of them puts those parts
// together. For any GPU.

const SLOTS = 32u;
const AT_ONCE = LANES * ROWS / SLOTS;

var<workgroup> parts: array<Part, LANES * ROWS>;
// Mean and 1 / deviation of as many groups as the channels of a workgroup can lie in.
var<workgroup> groups: array<vec2f, LANES * COLUMNS * 8u>;

fn joined(first: u32) -> vec2f {
  let count = f32(p.tokens) * f32(p.groupChannels);
  let origin = parts[first].mean;
  var sum = 0.0;
  for (var i = first; i < first + SLOTS; i++) { sum += parts[i].n * (parts[i].mean - origin); }
  var m2 = 0.0;
  for (var i = first; i < first + SLOTS; i++) {
    let d = parts[i].mean - origin - sum / count;
    m2 += parts[i].m2 + parts[i].n * d * d;
  }
  return vec2f(origin + sum / count, inverseSqrt(m2 / count + p.eps));
}

fn affinesOf(image: u32, firstOctet: u32, index: u32) -> array<Affines, COLUMNS> {
  let first = groupOf(8u * firstOctet);
  let last = groupOf(8u * (firstOctet + LANES * COLUMNS) - 1u);
  for (var group = first; group <= last; group += AT_ONCE) {
    let mine = min(group + index / SLOTS, last);
    parts[index] = partOf(image, mine, index % SLOTS, SLOTS / CHANNEL_SLOTS);
    workgroupBarrier();
    if (index % SLOTS == 0u) { groups[mine - first] = joined(index); }
    workgroupBarrier();
  }
  var affines = array<Affines, COLUMNS>();
  for (var c = 0u; c < COLUMNS; c++) {
    for (var i = 0u; i < 2u; i++) {
      let quad = 2u * (firstOctet + index % LANES + c * LANES) + i;
      let at = channelsOf(min(quad, p.quads - 1u)) / p.groupChannels - first;
      let mean = vec4f(groups[at.x].x, groups[at.y].x, groups[at.z].x, groups[at.w].x);
      let rstd = vec4f(groups[at.x].y, groups[at.y].y, groups[at.z].y, groups[at.w].y);
      affines[c][i] = affineOf(quad, mean, rstd);
    }
  }
  return affines;
}
