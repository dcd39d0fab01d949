/** What the engine's tests share: files of a fixture in a temporary folder, requests from its cases, and forwards as numbers. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Engine } from '../../src/engine/engine.ts';
import type { FileSource, LoraUse, StepRequest } from '../../src/engine/types.ts';
import { UnetdError } from '../../src/errors.ts';
import { toF32 } from '../../src/half.ts';
import { caseOf, type Fixture, writeLora } from '../fixtures/fixture.ts';
import { type StoredDtype, writeCheckpoint } from '../fixtures/weights.ts';
import { requestOf, rowsOf } from '../unet/whole.ts';

/** A folder for one test file, and what removes it. */
export function temporaryFolder(): readonly [string, () => void] {
  const folder = mkdtempSync(join(tmpdir(), 'unetd-engine-'));
  return [folder, () => rmSync(folder, { recursive: true })];
}

export const sourceOf = (folder: string, name: string, version = '1'): FileSource => ({
  name,
  path: join(folder, `${name}.safetensors`),
  version,
});

/** Writes a fixture's checkpoint as `NAME.safetensors`. */
export function modelFile(
  folder: string,
  fixture: Fixture,
  name: string = fixture.metadata.architecture,
  dtype: StoredDtype = 'F16',
): FileSource {
  const source = sourceOf(folder, name);
  writeCheckpoint(source.path, fixture.metadata.tensors, { dtype, layout: 'ldm' });
  return source;
}

/** Writes a LoRA file of a fixture, under its own name unless told. */
export function loraFile(folder: string, fixture: Fixture, file: string, name: string = file): FileSource {
  const source = sourceOf(folder, name);
  writeLora(source.path, fixture, file);
  return source;
}

/** The requests of a fixture's case, one per image, each with its own stack. */
export function rowsOfCase(fixture: Fixture, name: string): readonly StepRequest[] {
  const which = caseOf(fixture, name);
  return rowsOf(requestOf(which)).map((request, row) => ({
    ...request,
    loras: stack(...(which.adapters[row] ?? which.adapters[0] ?? [])),
  }));
}

export const stack = (...uses: readonly (readonly [lora: string, strength: number])[]): readonly LoraUse[] =>
  uses.map(([lora, strength]) => ({ lora, strength }));

/** The results of one batch, one behind the other. */
export async function run(
  engine: Engine,
  model: string,
  requests: readonly StepRequest[],
): Promise<Float32Array> {
  const { outs } = await engine.forward({ model, requests });
  return Float32Array.from(outs.flatMap((out) => [...toF32(out.dtype, out.data)]));
}

/** The error that a promise ends with; throws where it does not, or with an error that has no code. */
export async function failureOf(promise: Promise<unknown>): Promise<UnetdError> {
  const error: unknown = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (error instanceof UnetdError) return error;
  throw new Error(error === undefined ? 'it was taken' : `no UnetdError: ${error}`, { cause: error });
}
