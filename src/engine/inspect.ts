/** What a model file holds, with messages that name the model. Reads the file's header only. */
import { UnetdError } from '../errors.ts';
import type { SafetensorsFile, TensorEntry } from '../safetensors.ts';
import type { UNetConfig } from '../unet/config.ts';
import { inspectUNet } from '../unet/detect.ts';
import { checkDtypes } from '../unet/packed.ts';

export interface InspectedModel {
  readonly config: UNetConfig;
  /** The tensor of the file that has an LDM name. */
  readonly entryOf: (ldmName: string) => TensorEntry;
}

/** The UNet in a file, whose tensors all can be loaded. ERR_MODEL_INVALID. */
export function inspectModel(name: string, file: SafetensorsFile): InspectedModel {
  try {
    const { config, sources } = inspectUNet(
      new Map([...file.tensors].map(([key, { shape }]) => [key, shape])),
    );
    const entryOf = (ldmName: string): TensorEntry => file.tensors.get(sources.get(ldmName)!)!;
    checkDtypes(config, entryOf);
    return { config, entryOf };
  } catch (error) {
    const { code, message, details } = UnetdError.from(error);
    throw new UnetdError(code, `Cannot load model "${name}": ${message}`, { model: name, ...details });
  }
}
