// Scale and shift of the channels of a workgroup that is one subgroup: its lanes are the slots of one group after the other. Those
// of one column at a time, in a loop that is not unrolled, as few values are carried from group to group: that compiles in a
// quarter of the time.
// Preconditions: subgroups of LANES lanes; ROWS = 1.

fn affinesOf(image: u32, firstOctet: u32, lane: u32) -> array<Affines, COLUMNS> {
  let count = f32(p.tokens) * f32(p.groupChannels);
  var affines = array<Affines, COLUMNS>();
  for (var c = 0u; c < COLUMNS; c++) {
    let first = firstOctet + c * LANES;
    let quad = 2u * (first + lane);
    var mean = array<vec4f, 2>();
    var rstd = array<vec4f, 2>();
    for (var group = groupOf(8u * first); group <= groupOf(8u * (first + LANES) - 1u); group++) {
      let part = partOf(image, group, lane, LANES / CHANNEL_SLOTS);
      let origin = subgroupBroadcast(part.mean, 0u);
      let distance = laneSum(part.n * (part.mean - origin)) / count;
      let d = part.mean - origin - distance;
      let variance = laneSum(part.m2 + part.n * d * d) / count;
      // The last group that begins before a channel is the channel's.
      for (var i = 0u; i < 2u; i++) {
        let begun = channelsOf(quad + i) >= vec4u(group * p.groupChannels);
        mean[i] = select(mean[i], vec4f(origin + distance), begun);
        rstd[i] = select(rstd[i], vec4f(inverseSqrt(variance + p.eps)), begun);
      }
    }
    affines[c] = Affines(affineOf(quad, mean[0], rstd[0]), affineOf(quad + 1u, mean[1], rstd[1]));
  }
  return affines;
}
