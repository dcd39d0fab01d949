/**
 * The contact sheet: one row per workflow, its name and LoRA stack on the left, its pictures enlarged with their prompts.
 * Makes PNG bytes; writes no files.
 */
import { PNG } from 'pngjs';
import { drawText, textWidth } from './font.ts';

export interface SheetRow {
  readonly title: string;
  readonly lines: readonly string[];
  readonly captions: readonly string[];
  /** One [3, H, W] picture in [-1, 1] per caption. */
  readonly pictures: readonly Float32Array[];
}

type Colour = readonly [number, number, number];

const ZOOM = 4;
const GAP = 14;
const LABEL_WIDTH = 220;
const CAPTION_HEIGHT = 20;
const PAPER: Colour = [246, 245, 242];
const INK: Colour = [40, 40, 48];
const FAINT: Colour = [120, 118, 126];

/** PNG bytes of the rows; every picture is `edge` pixels high and wide before it is enlarged. */
export function contactSheet(rows: readonly SheetRow[], edge: number): Buffer {
  const size = edge * ZOOM;
  const columns = Math.max(...rows.map((row) => row.pictures.length));
  const rowHeight = size + CAPTION_HEIGHT + GAP;
  const png = new PNG({
    width: LABEL_WIDTH + columns * (size + GAP) + GAP,
    height: GAP + rows.length * rowHeight,
  });
  fill(png, PAPER);
  for (const [index, row] of rows.entries()) {
    const top = GAP + index * rowHeight;
    write(png, row.title, GAP, top + 8, 2, INK);
    for (const [line, text] of row.lines.entries()) write(png, text, GAP, top + 36 + line * 14, 1, FAINT);
    for (const [column, picture] of row.pictures.entries()) {
      const left = LABEL_WIDTH + column * (size + GAP);
      enlarge(png, picture, edge, left, top);
      const caption = row.captions[column] ?? '';
      write(png, caption, left + Math.floor((size - textWidth(caption)) / 2), top + size + 6, 1, FAINT);
    }
  }
  return PNG.sync.write(png);
}

function set(png: PNG, x: number, y: number, [red, green, blue]: Colour): void {
  if (x < 0 || y < 0 || x >= png.width || y >= png.height) return;
  png.data.set([red, green, blue, 255], 4 * (y * png.width + x));
}

function fill(png: PNG, colour: Colour): void {
  for (let y = 0; y < png.height; y++) for (let x = 0; x < png.width; x++) set(png, x, y, colour);
}

function write(png: PNG, text: string, x: number, y: number, scale: number, colour: Colour): void {
  drawText(text, x, y, scale, (px, py) => set(png, px, py, colour));
}

/** Each pixel of a [3, edge, edge] picture as a square: what the UNet made, not smoothed. */
function enlarge(png: PNG, picture: Float32Array, edge: number, left: number, top: number): void {
  const byte = (channel: number, pixel: number): number =>
    Math.round(Math.min(255, Math.max(0, (picture[channel * edge * edge + pixel]! + 1) * 127.5)));
  for (let y = 0; y < edge * ZOOM; y++) {
    for (let x = 0; x < edge * ZOOM; x++) {
      const pixel = Math.floor(y / ZOOM) * edge + Math.floor(x / ZOOM);
      set(png, left + x, top + y, [byte(0, pixel), byte(1, pixel), byte(2, pixel)]);
    }
  }
}
