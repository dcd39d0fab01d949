// No low-rank terms: the base layer alone.

fn loraBlocks(image: u32) -> vec2u { return vec2u(0u); }

fn loraUp(block: u32, panel: u32, index: u32) -> vec4f { return vec4f(0.0); }

fn loraUp4(block: u32, panel: u32, index: u32) -> mat4x4f { return mat4x4f(); }

fn loraT(block: u32, m: u32, half: u32) -> vec4f { return vec4f(0.0); }
