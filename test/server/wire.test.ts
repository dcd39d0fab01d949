/** Frames to messages and back, on raw bytes and on anything at all. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { UnetdError } from '../../src/errors.ts';
import { encode } from '../../src/safetensors.ts';
import { decodeFrame, encodeBinary, encodeText, idOf } from '../../src/server/wire.ts';
import { tensor } from './setting.ts';

function refusal(frame: string | Uint8Array): UnetdError {
  try {
    decodeFrame(frame, 'req');
  } catch (error) {
    if (error instanceof UnetdError) return error;
    throw error;
  }
  throw new Error('the frame was taken');
}

describe('frames', () => {
  it('read a text frame as a message without tensors', () => {
    const message = decodeFrame('{"id":"1","op":"stats"}', 'req');
    expect(message).toEqual({ header: { id: '1', op: 'stats' }, tensors: null });
    expect(idOf(message.header)).toBe('1');
  });

  it('bring tensors and header of a binary frame through unchanged', () => {
    const sent = [tensor('x', [1, 2, 3, 4], [1, 2, 2]), tensor('empty', [], [0, 3])];
    const header = { id: 'ü"\\', op: 'forward', loras: [{ lora: 'a', strength: -0.5 }] };
    const back = decodeFrame(encodeBinary(header, sent, 'req'), 'req');
    expect(back.header).toEqual(header);
    expect([...(back.tensors ?? new Map()).values()].map(({ name }) => name).sort()).toEqual(['empty', 'x']);
    expect(back.tensors?.get('x')).toMatchObject({ dtype: 'F32', shape: [1, 2, 2], data: sent[0]!.data });
  });

  it('take a binary frame without tensors', () => {
    const back = decodeFrame(encodeBinary({ id: '1' }, [], 'res'), 'res');
    expect(back).toEqual({ header: { id: '1' }, tensors: new Map() });
  });

  it('refuse a frame of the other direction and say what it holds', () => {
    expect(refusal(encodeBinary({ id: '1' }, [], 'res'))).toMatchObject({
      code: 'ERR_BAD_FRAME',
      message: expect.stringContaining('found: res'),
    });
    expect(refusal(encode([]))).toMatchObject({
      code: 'ERR_BAD_FRAME',
      message: expect.stringContaining('none'),
    });
  });

  it.each(['', 'null', '[]', '3', '"text"', '{', `${'['.repeat(100_000)}`, `${'{"a":'.repeat(100_000)}`])(
    'refuse the text %.12s',
    (text) => {
      expect(refusal(text).code).toBe('ERR_BAD_FRAME');
      expect(refusal(encode([], new Map([['req', text]]))).code).toBe('ERR_BAD_FRAME');
    },
  );

  it('survive any bytes and any text', () => {
    const attempt = (frame: string | Uint8Array): void => {
      try {
        decodeFrame(frame, 'req');
      } catch (error) {
        expect(error).toBeInstanceOf(UnetdError);
        expect((error as UnetdError).code).toBe('ERR_BAD_FRAME');
      }
    };
    fc.assert(fc.property(fc.uint8Array({ maxLength: 200 }), attempt));
    fc.assert(fc.property(fc.string({ unit: 'binary', maxLength: 100 }), attempt));
    fc.assert(fc.property(fc.json(), attempt));
  });

  it('survive any change of one byte of a good frame', () => {
    const good = encodeBinary({ id: '1', op: 'forward' }, [tensor('x', [1, 2])], 'req');
    fc.assert(
      fc.property(
        fc.nat(good.length - 1),
        fc.integer({ min: 0, max: 255 }),
        fc.nat(good.length),
        (at, value, end) => {
          for (const length of [good.length, end]) {
            const frame = good.slice(0, length);
            if (at < length) frame[at] = value;
            try {
              decodeFrame(frame, 'req');
            } catch (error) {
              expect((error as UnetdError).code).toBe('ERR_BAD_FRAME');
            }
          }
        },
      ),
      { numRuns: 1000 },
    );
  });

  it('bring any JSON header through', () => {
    fc.assert(
      fc.property(fc.dictionary(fc.string({ unit: 'binary' }), fc.jsonValue({ maxDepth: 4 })), (header) => {
        const expected = JSON.parse(JSON.stringify(header));
        expect(decodeFrame(encodeText(header), 'req').header).toEqual(expected);
        expect(decodeFrame(encodeBinary(header, [], 'req'), 'req').header).toEqual(expected);
      }),
    );
  });
});
