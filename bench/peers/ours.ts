/**
 * The contender of this project: kernels as the tests' cases build them, and forwards of the engine. argv: storage, adapter or an
 * empty string, and a file of choices that `unetd tune` measured.
 */
import { writeFileSync } from 'node:fs';
import { Engine } from '../../src/engine/engine.ts';
import type { TensorData } from '../../src/engine/types.ts';
import { Device, Usage } from '../../src/gpu/device.ts';
import type { Storage } from '../../src/gpu/kernel.ts';
import { toF32 } from '../../src/half.ts';
import { closePrepared, prepare } from '../../test/kernels/run.ts';
import { modelFile, stepOf } from '../full-size.ts';
import { contend, type Loaded } from './contender.ts';
import { type Job, STEPS, transpose, WORKS, type Work } from './works.ts';

const storage = process.argv[2] as Storage;
const adapter = process.argv[3] || undefined;
const tuning = process.argv[4] ?? false;

async function kernel({ case: one, repeats, transposed }: Work): Promise<Loaded> {
  const device = await Device.open({ adapter });
  const built = one!.build(storage);
  const prepared = await prepare(device, built, storage, undefined);
  const { plan, arena, tensors } = prepared;
  const feeds = Object.keys(built.inputs).flatMap((name) => tensors.get(name) ?? []);
  const { virtual } = tensors.get('out')!;
  const half = storage === 'f16';
  const sizeBytes = built.outputs.out!.count * (half ? 2 : 4);
  const staging = device.createBuffer('result', sizeBytes, Usage.MAP_READ | Usage.COPY_DST);
  // One submit and a staging buffer that stays, as the engine runs a forward.
  const run = (): Promise<Uint8Array> => {
    for (const feed of feeds) plan.write(feed.virtual, feed.image);
    const encoder = device.gpu.createCommandEncoder();
    for (let i = 0; i < repeats; i++) plan.encode(encoder);
    encoder.copyBufferToBuffer(arena.buffer, plan.offsetOf(virtual), staging, 0, sizeBytes);
    device.gpu.queue.submit([encoder.finish()]);
    return device.readMapped(staging, sizeBytes);
  };
  return {
    run,
    result: async () => {
      const out = toF32(half ? 'F16' : 'F32', await run());
      return transposed ? transpose(out, ...transposed) : out;
    },
    close: async () => {
      staging.destroy();
      closePrepared(prepared);
      device.close();
    },
  };
}

async function unet({ full }: Work): Promise<Loaded> {
  const { model, size, images } = full!;
  const engine = await Engine.create({ tuning, ...(adapter ? { adapter } : {}) });
  await engine.loadModel(modelFile(model), storage);
  const batch = { model, requests: [stepOf(images, size, model)] };
  const run = async (): Promise<TensorData> => (await engine.forward(batch)).outs[0]!;
  return {
    run,
    result: async () => {
      const { dtype, data } = await run();
      return toF32(dtype, data);
    },
    close: () => engine.close(),
  };
}

await contend(
  ({ name }: Job) => {
    const work = [...WORKS, ...STEPS].find((one) => one.name === name)!;
    return work.full ? unet(work) : kernel(work);
  },
  (path, values) => writeFileSync(path, values),
);
// Dawn's instance keeps node alive.
process.exit();
