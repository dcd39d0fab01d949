// Scale and shift of the channels of a workgroup that is one subgroup: its lanes are the slots of one group after the other.
// Preconditions: subgroups of LANES lanes, as many as CHANNEL_SLOTS; ROWS = 1.

fn affinesOf(image: u32, firstQuad: u32, lane: u32) -> array<Affine, COLUMNS> {
  let quad = firstQuad + lane;
  let count = f32(p.tokens) * f32(p.groupChannels);
  var mean = array<vec4f, COLUMNS>();
  var rstd = array<vec4f, COLUMNS>();
  for (var group = firstGroup(firstQuad); group <= lastGroup(firstQuad); group++) {
    let part = partOf(image, group, lane, 1u);
    let origin = subgroupBroadcast(part.mean, 0u);
    let distance = subgroupAdd(part.n * (part.mean - origin)) / count;
    let d = part.mean - origin - distance;
    let variance = subgroupAdd(part.m2 + part.n * d * d) / count;
    // The last group that begins before a channel is the channel's.
    for (var c = 0u; c < COLUMNS; c++) {
      let begun = channelsOf(quad + c * LANES) >= vec4u(group * p.groupChannels);
      mean[c] = select(mean[c], vec4f(origin + distance), begun);
      rstd[c] = select(rstd[c], vec4f(inverseSqrt(variance + p.eps)), begun);
    }
  }
  var affines = array<Affine, COLUMNS>();
  for (var c = 0u; c < COLUMNS; c++) { affines[c] = affineOf(quad + c * LANES, mean[c], rstd[c]); }
  return affines;
}
