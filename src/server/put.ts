/**
 * How an upload is cut into frames of whole tensors, as the protocol has it. Sends nothing.
 */
import { UnetdError } from '../errors.ts';
import type { TensorView } from '../safetensors.ts';

/** Room that a frame's header takes per tensor, generously: JSON of the name, dtype, shape and offsets. */
const HEADER_BYTES_PER_TENSOR = 256;
const HEADER_BYTES = 1024;

/** Where a part ends: larger ones gain nothing, and take memory of both sides for longer. */
const PART_BYTES = 64 * 1024 * 1024;

/** At least one part, each frame below `maxBytes`. A tensor may be as large as that allows: ERR_TOO_LARGE for one that fits no frame. */
export function cutParts(
  tensors: Iterable<TensorView>,
  maxBytes: number,
): readonly (readonly TensorView[])[] {
  const parts: TensorView[][] = [[]];
  let used = HEADER_BYTES;
  for (const tensor of tensors) {
    const bytes = tensor.data.byteLength + HEADER_BYTES_PER_TENSOR + 6 * tensor.name.length;
    if (bytes + HEADER_BYTES > maxBytes) {
      throw new UnetdError(
        'ERR_TOO_LARGE',
        `Tensor "${tensor.name}" takes ${tensor.data.byteLength} bytes, a frame at most ${maxBytes}; put the file into a folder of the server instead.`,
      );
    }
    const current = parts.at(-1)!;
    if (current.length > 0 && used + bytes > Math.min(PART_BYTES, maxBytes)) {
      parts.push([tensor]);
      used = HEADER_BYTES;
    } else current.push(tensor);
    used += bytes;
  }
  return parts;
}
