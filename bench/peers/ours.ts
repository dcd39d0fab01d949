/** The contender of this project: kernels as the tests' cases build them, and forwards of the engine. argv: storage, adapter. */
import { writeFileSync } from 'node:fs';
import { Engine } from '../../src/engine/engine.ts';
import { Device } from '../../src/gpu/device.ts';
import type { Storage } from '../../src/gpu/kernel.ts';
import { toF32 } from '../../src/half.ts';
import { closePrepared, prepare } from '../../test/kernels/run.ts';
import { modelFile, stepOf } from '../full-size.ts';
import { contend, type Loaded } from './contender.ts';
import { type Job, transpose, WORKS, type Work } from './works.ts';

const [, , storage, adapter] = process.argv as unknown as [string, string, Storage, string | undefined];

async function kernel({ case: one, repeats, transposed }: Work): Promise<Loaded> {
  const device = await Device.open({ adapter });
  const built = one!.build(storage);
  const prepared = await prepare(device, built, storage, undefined);
  const { plan, arena, tensors } = prepared;
  const feeds = Object.keys(built.inputs).flatMap((name) => tensors.get(name) ?? []);
  const { virtual } = tensors.get('out')!;
  const half = storage === 'f16';
  const sizeBytes = built.outputs.out!.count * (half ? 2 : 4);
  const run = async (): Promise<Float32Array> => {
    for (const feed of feeds) plan.write(feed.virtual, feed.image);
    const encoder = device.gpu.createCommandEncoder();
    for (let i = 0; i < repeats; i++) plan.encode(encoder);
    device.gpu.queue.submit([encoder.finish()]);
    const bytes = await device.read(arena.buffer, plan.offsetOf(virtual), sizeBytes);
    // Others give f32, so the way there counts.
    return toF32(half ? 'F16' : 'F32', bytes);
  };
  return {
    run,
    result: async () => {
      const out = await run();
      return transposed ? transpose(out, ...transposed) : out;
    },
    close: async () => {
      closePrepared(prepared);
      device.close();
    },
  };
}

async function unet({ full }: Work): Promise<Loaded> {
  const { model, size } = full!;
  const engine = await Engine.create(adapter ? { adapter } : {});
  await engine.loadModel(modelFile(model), storage);
  const batch = { model, requests: [stepOf(1, size, model)] };
  const run = async (): Promise<Float32Array> => {
    const [out] = (await engine.forward(batch)).outs;
    return toF32(out!.dtype, out!.data);
  };
  return { run, result: run, close: () => engine.close() };
}

await contend(
  ({ name }: Job) => {
    const work = WORKS.find((one) => one.name === name)!;
    return work.full ? unet(work) : kernel(work);
  },
  (path, values) => writeFileSync(path, values),
);
// Dawn's instance keeps node alive.
process.exit();
