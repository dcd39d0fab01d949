/**
 * Whole UNets whose matmuls and attentions run on matrix units, where the adapter has any, against outputs of the reference
 * implementation in PyTorch. A software adapter is taken for a GPU: it would choose other variants for itself.
 */
import { afterAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/gpu/device.ts';
import { attention } from '../../src/kernels/attention.ts';
import { gemm } from '../../src/kernels/gemm.ts';
import { pick } from '../../src/kernels/pick.ts';
import { gemmChoice } from '../../src/kernels/split_k.ts';
import { type ArchitectureName, caseOf, readFixture } from '../fixtures/fixture.ts';
import { checkpointOf, compareBlocks, loadWeights, TOLERANCE } from './whole.ts';

const storage = 'f16';
const device = await Device.open().catch(() => undefined);
const capabilities = device && { ...device.capabilities, software: false };
afterAll(() => device?.close());

const hasUnits = capabilities && /^sgm/.test(pick(gemm, capabilities, { format: storage }).choice.variant);
if (!hasUnits) console.log('[matrix] this adapter has no matrix units of a known shape: skipped');

/** Every block of a forward; the first wrong one fails. */
async function check(architecture: ArchitectureName, choose = gemmChoice): Promise<void> {
  const fixture = readFixture(architecture);
  const [path, remove] = checkpointOf(fixture);
  const model = await loadWeights(device!, storage, path);
  remove();
  const compared = await compareBlocks(
    device!,
    storage,
    model,
    fixture,
    caseOf(fixture, 'base'),
    capabilities,
    choose,
  );
  model.weights.close();
  const wrong = compared.find(({ error }) => !(error <= TOLERANCE[storage]));
  expect(wrong, `the first wrong block of ${architecture}`).toBeUndefined();
  const { error } = compared.at(-1)!;
  console.log(`[matrix] ${architecture}: normalised error ${error.toExponential(2)} of a forward`);
}

describe.skipIf(!hasUnits)('a forward on matrix units', () => {
  test.each(['sd1', 'sdxl'] as const)('of %s is right in every block', async (architecture) => {
    expect(pick(attention, capabilities!, { headDim: 40, format: storage }).choice.variant).toMatch(/^sgm/);
    await check(architecture);
  });

  test('that adds every GEMM up from three parts is right in every block', () =>
    check('sd1', (...args) => ({ ...gemmChoice(...args), splits: 3 })));
});
