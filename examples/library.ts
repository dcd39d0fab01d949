/**
 * The engine as a library, without a server: loads the demo's UNet and a LoRA, and runs two requests with different LoRA
 * stacks as one batch. Run it with `npx tsx examples/library.ts`.
 */
import { fileURLToPath } from 'node:url';
// In a project of your own: import { Engine, type StepRequest, type TensorData } from 'unetd';
import { Engine, type StepRequest, type TensorData } from '../src/index.ts';

const asset = (name: string): string => fileURLToPath(new URL(`../demo/assets/${name}`, import.meta.url));

function tensor(shape: readonly number[], values: ArrayLike<number>): TensorData {
  return { dtype: 'F32', shape, data: new Uint8Array(Float32Array.from(values).buffer) };
}

const size = 32;
const engine = await Engine.create();
console.log(`device: ${engine.device.name}`);
const { config, dtype, sizeBytes } = await engine.loadModel(
  { name: 'emoji', path: asset('models/emoji-unet.safetensors'), version: '1' },
  'auto',
);
console.log(`weights: ${(sizeBytes / 1e6).toFixed(1)} MB in ${dtype}`);
const ink = await engine.loadAdapter(
  { name: 'ink', path: asset('loras/ink.safetensors'), version: '1' },
  'emoji',
);
console.log(`LoRA: ${ink.layers} layers, rank ${ink.rank}, ${ink.unmatched.length} unmatched keys`);

const pixels = config.inChannels * size * size;
const plain: StepRequest = {
  loras: [],
  x: tensor(
    [1, config.inChannels, size, size],
    Array.from({ length: pixels }, (_, i) => Math.sin(i * 12.9898)),
  ),
  timesteps: tensor([1], [500]),
  context: tensor([1, 4, config.contextDim], new Float32Array(4 * config.contextDim)),
};
const inked: StepRequest = { ...plain, loras: [{ lora: 'ink', strength: 0.8 }] };

const { outs, gpuMs } = await engine.forward({ model: 'emoji', requests: [plain, inked] });
console.log(
  `two requests, one forward: ${outs.map((out) => `[${out.shape}]`).join(' and ')} in ${gpuMs.toFixed(0)} ms`,
);
await engine.close();
