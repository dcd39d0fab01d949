/**
 * How packed weights are stored: panels of 32 columns, [n / 32][k][32], as Quads of a storage dtype or as blocks of 8-bit
 * numbers. The layouts stand in `shaders/lib/w_*.wgsl`. Arithmetic only.
 */
import { type Capabilities, type Storage, storageBytes } from '../gpu/kernel.ts';

/** Columns of a packed weight panel. */
export const PANEL = 32;

/** `q8_0`: signed bytes, a half as the scale of each 32 of them along k. */
export type WeightFormat = Storage | 'q8_0';

/** k of a q8_0 block. */
export const BLOCK = 32;
const BLOCK_BYTES: number = BLOCK * PANEL + 2 * PANEL;

/** What activations and low-rank terms are stored as beside such weights. */
export const storageOf = (format: WeightFormat): Storage => (format === 'q8_0' ? 'f16' : format);

/** What a matrix of `k` rows is stored as where the model is stored as `format`: q8_0 needs whole blocks. */
export const formatOf = (k: number, format: WeightFormat): WeightFormat =>
  k % BLOCK === 0 ? format : storageOf(format);

/** Bytes of one panel. In q8_0, `k` is a multiple of 32. */
export const panelBytes = (k: number, format: WeightFormat): number =>
  format === 'q8_0' ? (k / BLOCK) * BLOCK_BYTES : k * PANEL * storageBytes(format);

/**
 * How many panels of `bytes` each are bound at once: all of them, or as many as fit such that the next ones start where a
 * binding may. 0 where the adapter cannot bind as many as that takes, `leastPanels`.
 */
export function panelsPerBinding(panels: number, bytes: number, capabilities: Capabilities): number {
  const most = Math.floor(capabilities.maxBindingBytes / bytes);
  const least = leastPanels(bytes, capabilities);
  return most >= panels ? panels : Math.floor(most / least) * least;
}

/** Least number of panels of `bytes` that reach from where a binding may start to another such place. */
export function leastPanels(bytes: number, { offsetAlignment }: Capabilities): number {
  let panels = 1;
  // Ends: alignments are powers of two.
  while ((panels * bytes) % offsetAlignment !== 0) panels *= 2;
  return panels;
}

/** The choice of a kernel's option for packed weights. */
export const choiceOf = (format: WeightFormat | undefined): 'quads' | 'q8_0' =>
  format === 'q8_0' ? 'q8_0' : 'quads';

/** Files that read packed weights `w`, by choice. */
export const W_FILES: Readonly<Record<'quads' | 'q8_0', string>> = {
  quads: 'lib/w_quads.wgsl',
  q8_0: 'lib/w_q8_0.wgsl',
};
