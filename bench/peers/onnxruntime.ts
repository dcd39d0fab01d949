/** The contender onnxruntime-node. argv: execution provider, `webgpu` or `cpu`. */
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fromF32, toF32 } from '../../src/half.ts';
import { decode } from '../../src/safetensors.ts';
import { contend, type Loaded } from './contender.ts';
import { type Job, PEERS } from './works.ts';

type Values = Float32Array | Uint16Array;
interface OrtTensor {
  readonly type: string;
  readonly data: Values;
}
interface Session {
  readonly inputNames: readonly string[];
  readonly inputMetadata: readonly { readonly name: string; readonly type: string }[];
  readonly outputNames: readonly string[];
  run(feeds: Readonly<Record<string, OrtTensor>>): Promise<Readonly<Record<string, OrtTensor>>>;
  release(): Promise<void>;
}
/** What is used of onnxruntime-node, which the package does not depend on. */
interface Ort {
  readonly InferenceSession: { create(path: string, options: object): Promise<Session> };
  readonly Tensor: new (type: string, data: Values, shape: readonly number[]) => OrtTensor;
}

const ort = createRequire(PEERS)('onnxruntime-node') as Ort;
const provider = process.argv[2]!;

async function open(path: string, data: string): Promise<Loaded> {
  const session = await ort.InferenceSession.create(path, {
    executionProviders: [provider],
    logSeverityLevel: 3,
  });
  const { tensors } = decode(readFileSync(data));
  const feeds = Object.fromEntries(
    session.inputMetadata.map(({ name, type }) => {
      const { shape, data: bytes } = tensors.get(name)!;
      const values = toF32('F32', bytes);
      const halves = (): Uint16Array => new Uint16Array(fromF32('F16', values).slice().buffer);
      return [name, new ort.Tensor(type, type === 'float16' ? halves() : values, shape)];
    }),
  );
  const run = async (): Promise<OrtTensor> => (await session.run(feeds))[session.outputNames[0]!]!;
  return {
    run,
    result: async () => {
      const { type, data: values } = await run();
      if (type !== 'float16') return values as Float32Array;
      return toF32('F16', new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
    },
    close: () => session.release(),
  };
}

async function load({ onnx, onnxOnce, data }: Job): Promise<Loaded> {
  const loaded = await open(onnx, data);
  if (onnxOnce === onnx) return loaded;
  return {
    ...loaded,
    result: async () => {
      await loaded.run();
      const once = await open(onnxOnce, data);
      const out = await once.result();
      await once.close();
      return out;
    },
  };
}

await contend(load, (path, values) => writeFileSync(path, values));
process.exit();
