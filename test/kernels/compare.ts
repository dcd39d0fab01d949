/** Compares a result with its reference and says where and by how much they differ. Pure; knows no GPU. */
import type { Tolerance } from './case.ts';

/** Undefined when `out` is within tolerance of `ref`, else one line that names the worst element. */
export function difference(
  name: string,
  out: Float32Array,
  ref: Float64Array,
  tolerance: Tolerance,
): string | undefined {
  if (out.length !== ref.length) return `${name}: ${out.length} values, expected ${ref.length}`;
  // NaN and Inf first: one of them would make every norm meaningless.
  const broken = out.findIndex((value) => !Number.isFinite(value));
  if (broken >= 0) return `${name}[${broken}] is ${out[broken]}, expected ${ref[broken]}`;
  let error = 0;
  let size = 0;
  let worst = 0;
  let worstAt = 0;
  let largest = 0;
  for (let i = 0; i < ref.length; i++) {
    const distance = Math.abs(out[i]! - ref[i]!);
    error += distance * distance;
    size += ref[i]! * ref[i]!;
    largest = Math.max(largest, Math.abs(ref[i]!));
    if (distance > worst) {
      worst = distance;
      worstAt = i;
    }
  }
  const norm = size > 0 ? Math.sqrt(error / size) : Math.sqrt(error);
  const max = largest > 0 ? worst / largest : worst;
  if (norm <= tolerance.norm && max <= tolerance.max) return undefined;
  return (
    `${name}: normalised error ${norm.toExponential(2)} (allowed ${tolerance.norm.toExponential(2)}), ` +
    `largest ${max.toExponential(2)} (allowed ${tolerance.max.toExponential(2)}); ` +
    `worst at [${worstAt}]: ${out[worstAt]}, expected ${ref[worstAt]}`
  );
}
