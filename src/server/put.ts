/**
 * How an upload is cut into frames: whole tensors, in order of name, each part below a byte limit. Sends nothing.
 */
import { UnetdError } from '../errors.ts';
import type { TensorView } from '../safetensors.ts';

/** Room that a frame's header takes per tensor, generously: JSON of the name, dtype, shape and offsets. */
const HEADER_BYTES_PER_TENSOR = 256;
const HEADER_BYTES = 1024;

/** The tensors in parts whose frames stay below `maxBytes`; at least one part. ERR_TOO_LARGE for a tensor that fits no frame. */
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
    if (used + bytes > maxBytes) {
      parts.push([]);
      used = HEADER_BYTES;
    }
    parts[parts.length - 1]!.push(tensor);
    used += bytes;
  }
  return parts;
}
