// Which panels a workgroup that computes two of them has, counted from panel0: neighbours, or with GATED one and its gates.

// The first or second one to multiply by; the last workgroup may repeat one.
fn panelOf(group: u32, which: u32) -> u32 {
  return select(min(group * 2u + which, p.panels - 1u), group + which * p.panels, GATED);
}

// The panel of out that the first or second one makes, or with GATED both; there may be no second one.
fn outPanelOf(group: u32, which: u32) -> u32 { return select(group * 2u + which, group, GATED); }
