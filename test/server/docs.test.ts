/** The public documents say what the code does: the error table both ways, the example frames byte by byte. */
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { tensorFrom } from '../../src/client.ts';
import { ERRORS } from '../../src/errors.ts';
import { digest, type TensorView } from '../../src/safetensors.ts';
import { OPERATIONS } from '../../src/server/protocol.ts';
import { DEFAULTS } from '../../src/server/serve.ts';
import { decodeFrame, encodeBinary } from '../../src/server/wire.ts';

const read = (name: string): string => readFileSync(new URL(`../../docs/${name}`, import.meta.url), 'utf8');

const view = (name: string, shape: number[], values: number[], dtype: 'F32' | 'F16' = 'F32'): TensorView => ({
  name,
  ...tensorFrom(Float32Array.from(values), shape, dtype),
});

describe('docs/ERRORS.md', () => {
  it('has exactly the codes of the table in the source, with the same words', () => {
    const rows = [...read('ERRORS.md').matchAll(/^\| `(ERR_\w+)` \| (.*?) \| (.*?) \|$/gm)];
    expect(Object.fromEntries(rows.map(([, code, when]) => [code, when]))).toEqual(ERRORS);
    for (const [, , , cure] of rows) expect(cure).not.toBe('');
  });
});

describe('docs/PROTOCOL.md', () => {
  const text = read('PROTOCOL.md');

  it('names every operation with its kind of frame', () => {
    for (const [op, frame] of Object.entries(OPERATIONS)) {
      const row = text.split('\n').find((line) => line.startsWith('|') && line.includes(`\`${op}\``));
      expect(row?.split('|')[2]?.trim(), op).toBe(frame);
    }
  });

  it('names no error code that does not exist', () => {
    for (const [code] of text.matchAll(/ERR_[A-Z]\w+/g)) expect(Object.keys(ERRORS)).toContain(code);
  });

  it('states the real limits and the real digest', () => {
    expect(text).toContain(
      `"maxMessageBytes":${DEFAULTS.maxMessageBytes},"maxInFlight":${DEFAULTS.maxInFlight}`,
    );
    expect(text).toContain(digest([view('b', [2], [1, 2]), view('a', [1, 1], [0.5], 'F16')]));
  });

  it('shows frames that are just what is sent', () => {
    const dumps = [...text.matchAll(/```text\n([\s\S]*?)```/g)].map(([, dump]) =>
      Buffer.from(
        [...dump!.matchAll(/^[0-9a-f]{4} {2}((?:[0-9a-f]{2} )+)/gm)]
          .map(([, row]) => row!.replaceAll(' ', ''))
          .join(''),
        'hex',
      ),
    );
    const request = encodeBinary(
      { id: '7', op: 'forward', model: 'toy.safetensors' },
      [
        view('x', [1, 4, 1, 1], [1, -1, 0.5, 2], 'F16'),
        view('timesteps', [1], [999]),
        view('context', [1, 1, 2], [0.25, -0.5]),
      ],
      'req',
    );
    const timing = { queueMs: 0.2, gpuMs: 1.5, batch: 1, batchedRequests: 1 };
    const reply = encodeBinary(
      { id: '7', ok: true, timing },
      [view('out', [1, 4, 1, 1], [1, 0, 0, -2], 'F16')],
      'res',
    );
    expect(dumps).toEqual([Buffer.from(request), Buffer.from(reply)]);
    expect(decodeFrame(dumps[0]!, 'req').tensors?.get('x')?.shape).toEqual([1, 4, 1, 1]);
  });
});
