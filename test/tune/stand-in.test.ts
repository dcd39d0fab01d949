/** The UNets that are measured where no model is given: in every tensor of the shape that the real ones have. */
import { expect, test } from 'vitest';
import { ARCHITECTURE_NAMES, configOf } from '../../src/tune/stand-in.ts';
import { detectUNet } from '../../src/unet/detect.ts';
import { tensorsOf } from '../../src/unet/layers.ts';
import { shapesOf } from '../fixtures/shapes/load.ts';

test.each(ARCHITECTURE_NAMES)('random weights like %s have its tensors and are detected as it', (name) => {
  const config = configOf(name);
  expect(new Map([...tensorsOf(config)].sort())).toEqual(new Map([...shapesOf(name)].sort()));
  expect(config).toEqual(detectUNet(shapesOf(name)));
});
