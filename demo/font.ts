/**
 * A 5x7 bitmap font for the labels of the contact sheet: digits, lower-case letters and a little punctuation.
 * Draws into a pixel callback; upper case is drawn as lower case and what has no glyph as a space.
 */

export const GLYPH_WIDTH = 5;
export const GLYPH_HEIGHT = 7;

/** Per glyph seven rows, one character of base 32 each; the highest of five bits is the leftmost pixel. */
const GLYPHS: Readonly<Record<string, string>> = {
  a: '00e1fhf',
  b: 'ggmphhu',
  c: '00eghhe',
  d: '11djhhf',
  e: '00ehvge',
  f: '698s888',
  g: '00fhf1e',
  h: 'ggmphhh',
  i: '40c444e',
  j: '206222k',
  k: 'gghikoi',
  l: 'c44444e',
  m: '00qllhh',
  n: '00mphhh',
  o: '00ehhhe',
  p: '00mphug',
  q: '00djhf1',
  r: '00mpggg',
  s: '00ege1u',
  t: '88s8896',
  u: '00hhhjd',
  v: '00hhha4',
  w: '00hhlla',
  x: '00ha4ah',
  y: '00hhf1e',
  z: '00v248v',
  '0': 'ehjlphe',
  '1': '4c4444e',
  '2': 'eh1248v',
  '3': 'v2421he',
  '4': '26aiv22',
  '5': 'vgu11he',
  '6': '68guhhe',
  '7': 'v124888',
  '8': 'ehhehhe',
  '9': 'ehhf12c',
  '+': '044v440',
  '-': '000v000',
  '.': '00000cc',
  ',': '0000c48',
  ':': '0cc0cc0',
  '/': '012480g',
  '(': '2488842',
  ')': '8422248',
  '%': 'op248j3',
  '=': '00v0v00',
};

/** Pixels that `text` takes in width at scale 1. */
export function textWidth(text: string): number {
  return Math.max(0, text.length * (GLYPH_WIDTH + 1) - 1);
}

/** Calls `plot` with every set pixel of `text`, whose upper left corner is (x, y), each `scale` pixels wide. */
export function drawText(
  text: string,
  x: number,
  y: number,
  scale: number,
  plot: (x: number, y: number) => void,
): void {
  for (const [index, character] of [...text.toLowerCase()].entries()) {
    const rows = GLYPHS[character] ?? '0000000';
    for (let row = 0; row < GLYPH_HEIGHT; row++) {
      const bits = Number.parseInt(rows[row]!, 32);
      for (let column = 0; column < GLYPH_WIDTH; column++) {
        if (((bits >> (GLYPH_WIDTH - 1 - column)) & 1) === 0) continue;
        const left = x + (index * (GLYPH_WIDTH + 1) + column) * scale;
        const top = y + row * scale;
        for (let i = 0; i < scale * scale; i++) plot(left + (i % scale), top + Math.floor(i / scale));
      }
    }
  }
}
