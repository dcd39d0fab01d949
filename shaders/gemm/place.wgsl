// What a workgroup that computes 64 rows x two panels has of a GEMM: which panels, counted from panel0, which rows, and
// which steps of k. K may be cut into p.kSplits parts, the low-rank terms behind it included: along grid.y come the rows of
// the first part, then those of the second. The sums of part j of an image are stored as those of image
// image * splits + j would be; reduce.wgsl adds them. Precondition: grid.y is splits * ceil(m / 64).

struct Place {
  image: u32,
  part: u32,
  // The first index of the sums in out.
  slab: u32,
  m0: u32,
}

fn placeOf(group: vec3u) -> Place {
  let tiles = (p.m + 63u) / 64u;
  let image = p.image0 + group.z;
  let part = group.y / tiles;
  return Place(image, part, image * p.kSplits + part, group.y % tiles * 64u);
}

// Of `steps` of k in all, the first one of this part and the first one behind it.
fn stepsOf(place: Place, steps: u32) -> vec2u { return vec2u(place.part, place.part + 1u) * steps / p.kSplits; }

// The first or second panel to multiply by: neighbours, or with GATED one and its gates. The last workgroup may repeat one.
fn panelOf(group: u32, which: u32) -> u32 {
  return select(min(group * 2u + which, p.panels - 1u), group + which * p.panels, GATED);
}

// The panel of out that the first or second one makes, or with GATED both; there may be no second one.
fn outPanelOf(group: u32, which: u32) -> u32 { return select(group * 2u + which, group, GATED); }
