// Scale and shift of channels out of the moments of their groups, by parts: parallel variance,
//   M2 = sum_i m2_i + n_i (mean_i - mean)^2 (Chan, Golub, LeVeque 1979).
// What the two ways to put the parts together, fold_lanes.wgsl and fold_shared.wgsl, have in common. moments as in moments.wgsl.

struct Part { n: f32, mean: f32, m2: f32 }

// y = x * scale + shift, by channel.
struct Affine { scale: vec4f, shift: vec4f }

fn channelsOf(quad: u32) -> vec4u { return vec4u(quad * 4u) + vec4u(0u, 1u, 2u, 3u); }

// Of the two quads of an octet of channels.
alias Affines = array<Affine, 2>;

fn affineOf(quad: u32, mean: vec4f, rstd: vec4f) -> Affine {
  let q = min(quad, p.quads - 1u);
  let scale = rstd * gamma[q];
  return Affine(scale, beta[q] - mean * scale);
}

// The group of a channel; past the last, the last one's.
fn groupOf(channel: u32) -> u32 { return min(channel, p.quads * 4u - 1u) / p.groupChannels; }

fn moment(image: u32, chunk: u32, which: u32, channel: u32) -> f32 {
  return moments[((image * p.chunks + chunk) * 2u + which) * p.quads * 4u + channel];
}

const CHANNEL_SLOTS = 4u;

// Of a group, every CHANNEL_SLOTS-th channel and every chunkSlots-th chunk, from those of a slot on; n = 0 where there are none.
// Summed as distances from the first mean: see moments.wgsl.
fn partOf(image: u32, group: u32, slot: u32, chunkSlots: u32) -> Part {
  let first = group * p.groupChannels;
  let slotChannel = slot % CHANNEL_SLOTS;
  let slotChunk = slot / CHANNEL_SLOTS;
  if (slotChannel >= p.groupChannels || slotChunk >= p.chunks) { return Part(0.0, 0.0, 0.0); }
  let origin = moment(image, slotChunk, 0u, first + slotChannel);
  var n = 0.0;
  var sum = 0.0;
  var squares = 0.0;
  for (var chunk = slotChunk; chunk < p.chunks; chunk += chunkSlots) {
    let tokens = f32(min((chunk + 1u) * p.chunkTokens, p.tokens) - chunk * p.chunkTokens);
    for (var c = slotChannel; c < p.groupChannels; c += CHANNEL_SLOTS) {
      let d = moment(image, chunk, 0u, first + c) - origin;
      n += tokens;
      sum += tokens * d;
      squares += moment(image, chunk, 1u, first + c) + tokens * d * d;
    }
  }
  return Part(n, origin + sum / n, max(squares - sum * sum / n, 0.0));
}
