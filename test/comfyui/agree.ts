/** What the tests demand of two results of one workflow. */
import { expect } from 'vitest';
import type { Result } from './comfyui.ts';
import { latentDistance, pictureDistance } from './pictures.ts';

/** Of the largest magnitude, after the whole sampler run. */
export const LATENT_TOLERANCE = 1e-3;
/** Of 255. */
export const PICTURE_TOLERANCE = 2;
/** What a LoRA, a ControlNet, ... must change at least. */
const VISIBLE = { latent: 100 * LATENT_TOLERANCE, picture: 50 };

/** The largest differences of latents and of any of the pictures. */
export function distances(
  got: Result,
  expected: Result,
): { readonly latent: number; readonly picture: number } {
  expect(got.latents.length).toBe(1);
  expect(got.pictures.length).toBe(expected.pictures.length);
  const pictures = got.pictures.map((picture, index) => pictureDistance(picture, expected.pictures[index]!));
  return { latent: latentDistance(got.latents[0]!, expected.latents[0]!), picture: Math.max(...pictures) };
}

export function expectSame(got: Result, expected: Result): void {
  const { latent, picture } = distances(got, expected);
  expect(latent, 'latents').toBeLessThan(LATENT_TOLERANCE);
  expect(picture, 'pictures').toBeLessThanOrEqual(PICTURE_TOLERANCE);
}

export function expectVisiblyDifferent(one: Result, other: Result): void {
  const { latent, picture } = distances(one, other);
  expect(latent, 'latents').toBeGreaterThan(VISIBLE.latent);
  expect(picture, 'pictures').toBeGreaterThan(VISIBLE.picture);
}
