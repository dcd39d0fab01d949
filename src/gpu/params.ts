/** The params of a dispatch as bytes, in the order in which `link.ts` declares them. */
import type { Dispatch } from './kernel.ts';

/** Bytes that a kernel's params are bound with. */
export const PARAMS_BYTES = 80;

/** Writes the params, with those of `instead` in the place of the dispatch's own. */
export function writeParams(
  view: DataView,
  offset: number,
  { kernel, params, label }: Dispatch,
  instead: Readonly<Record<string, number>> = {},
): void {
  const fields = Object.entries(kernel.params);
  if (fields.length * 4 > PARAMS_BYTES)
    throw new Error(`kernel ${kernel.name} has more params than fit ${PARAMS_BYTES} bytes`);
  fields.forEach(([name, type], i) => {
    const value = instead[name] ?? params[name];
    if (value === undefined) throw new Error(`${label}: param ${name} of ${kernel.name} is missing`);
    const at = offset + 4 * i;
    if (type === 'f32') view.setFloat32(at, value, true);
    else if (type === 'i32') view.setInt32(at, value, true);
    else view.setUint32(at, value, true);
  });
}
