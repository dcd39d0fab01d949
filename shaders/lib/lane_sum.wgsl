// The sum over a subgroup of 8 lanes, in all of them: lavapipe's subgroupAdd is a loop over the lanes, one sum after the other.
fn laneSum(v: f32) -> f32 {
  let a = subgroupBroadcast(v, 0u) + subgroupBroadcast(v, 1u);
  let b = subgroupBroadcast(v, 2u) + subgroupBroadcast(v, 3u);
  let c = subgroupBroadcast(v, 4u) + subgroupBroadcast(v, 5u);
  let d = subgroupBroadcast(v, 6u) + subgroupBroadcast(v, 7u);
  return (a + b) + (c + d);
}
