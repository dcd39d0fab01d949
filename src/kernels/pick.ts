/** Which variant of a kernel runs on which adapter: one pure function over a table. Holds no state. */
import type { Capabilities, Kernel } from '../gpu/kernel.ts';

/** Facts of one use that a choice may depend on. */
export interface Shape {
  readonly headDim?: number;
  /** Keys of a tile of the attention for 8 lanes, 0 where the head width allows none. */
  readonly tileKeys?: number;
}

interface Rule {
  readonly variant: string;
  readonly when: (capabilities: Capabilities, shape: Shape) => boolean;
}

const always = (): boolean => true;
const lanes8 = (c: Capabilities): boolean => c.subgroupSize === 8;

/** The first rule that holds wins. */
const RULES: Readonly<Record<string, readonly Rule[]>> = {
  gemm: [
    // Shuffles from a constant lane are free on a software driver, workgroup memory is not: 48 against 6 to 11 GFLOP/s.
    { variant: 'broadcast', when: lanes8 },
    { variant: 'tile', when: always },
  ],
  lora_down: [
    // Four blocks per reading of A: 40 to 46 GFLOP/s against 22 to 28.
    { variant: 'broadcast', when: lanes8 },
    { variant: 'rows', when: (c) => c.software },
    { variant: 'row', when: always },
  ],
  attention: [
    { variant: 'scalar', when: (_, shape) => (shape.headDim ?? 0) % 4 !== 0 },
    { variant: 'broadcast', when: (c, { tileKeys = 0 }) => lanes8(c) && tileKeys > 0 },
    { variant: 'direct', when: always },
  ],
  layer_norm: [
    { variant: 'lanes', when: lanes8 },
    { variant: 'shared', when: always },
  ],
};

export function pick(kernel: Kernel, capabilities: Capabilities, shape: Shape = {}): string {
  const rule = RULES[kernel.name]?.find((r) => r.when(capabilities, shape));
  return rule?.variant ?? Object.keys(kernel.variants)[0]!;
}
