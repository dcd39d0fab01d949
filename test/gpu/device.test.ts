/** Opening a device and what it reports: adapters, names, missing drivers, errors outside and inside error scopes. */
import { execFileSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, test } from 'vitest';
import { Device, listAdapters, Usage } from '../../src/gpu/device.ts';

const device = await Device.open({ backend: 'null' });
afterAll(() => device.close());

const adapters = await listAdapters();
if (adapters.length === 0) console.log('[device] no adapter on this machine: the tests of names are skipped');

const ROOT = fileURLToPath(new URL('../../', import.meta.url));

/** Standard output of a TypeScript program in a process of its own. */
function childOutput(program: string, env: Readonly<Record<string, string>>): string {
  const args = ['--import', 'tsx', '--input-type=module', '-e', program];
  return execFileSync(process.execPath, args, { cwd: ROOT, env: { ...process.env, ...env } }).toString();
}

describe.skipIf(adapters.length === 0)('software rung: adapters', () => {
  test('are listed by name and backend', () => {
    for (const { name, backend } of adapters) {
      expect(name).not.toBe('');
      expect(backend).not.toBe('');
    }
  });

  test('are found by a part of their name', async () => {
    const named = await Device.open({ adapter: adapters[0]!.name.slice(0, 6) });
    expect(named.adapter.name).toContain(adapters[0]!.name.slice(0, 6));
    named.close();
  });

  test('of another name are refused with the names there are', async () => {
    await expect(Device.open({ adapter: 'Voodoo 2' })).rejects.toMatchObject({
      code: 'ERR_NO_ADAPTER',
      message: expect.stringContaining(`found "${adapters[0]!.name}"`),
      details: { asked: 'Voodoo 2' },
    });
  });
});

describe('null rung: a device', () => {
  test('says how to install a driver where there is none', () => {
    const program = `
      const { Device } = await import('./src/gpu/device.ts');
      try { await Device.open(); console.log('opened'); }
      catch (error) { console.log(error.code + ' ' + error.message); }`;
    const nowhere = { VK_DRIVER_FILES: '/nonexistent.json', VK_ICD_FILENAMES: '/nonexistent.json' };
    const output = childOutput(program, nowhere);
    expect(output).toMatch(/^ERR_NO_ADAPTER No usable GPU adapter was found; install a Vulkan driver/m);
  });

  test('reports an error outside any error scope at the next check, once', async () => {
    const small = device.createBuffer('small', 16, Usage.COPY_SRC);
    const encoder = device.gpu.createCommandEncoder();
    encoder.copyBufferToBuffer(small, 0, small, 0, 16);
    device.gpu.queue.submit([encoder.finish()]);
    // Errors arrive with an event of the loop.
    await device.gpu.queue.onSubmittedWorkDone();
    await new Promise((done) => setTimeout(done, 20));
    expect(() => device.check()).toThrow(expect.objectContaining({ code: 'ERR_GPU' }));
    expect(() => device.check()).not.toThrow();
    small.destroy();
  });

  test('names the work whose error scope caught an error', async () => {
    const work = device.guarded('a copy onto itself', () => {
      const buffer = device.createBuffer('buffer', 16, Usage.COPY_SRC);
      const encoder = device.gpu.createCommandEncoder();
      encoder.copyBufferToBuffer(buffer, 0, buffer, 0, 16);
      encoder.finish();
    });
    await expect(work).rejects.toMatchObject({
      code: 'ERR_GPU',
      message: expect.stringContaining('a copy onto itself'),
    });
    device.check();
  });

  test('lets errors of the guarded work itself through and leaves no scope behind', async () => {
    const work = device.guarded('work', () => {
      throw new Error('mine');
    });
    await expect(work).rejects.toThrow('mine');
    await expect(device.guarded('work', () => 7)).resolves.toBe(7);
  });

  test('refuses a buffer above the adapter limit before asking the driver', () => {
    const tooMuch = device.capabilities.maxBufferBytes + 16;
    expect(() => device.createBuffer('weights', tooMuch, Usage.STORAGE)).toThrow(
      expect.objectContaining({
        code: 'ERR_OUT_OF_MEMORY',
        details: expect.objectContaining({ needed: tooMuch }),
      }),
    );
  });

  test('turns every use after its loss into ERR_DEVICE_LOST', async () => {
    const lost = await Device.open({ backend: 'null' });
    lost.close();
    expect(await lost.lost).toMatch(/^device lost/);
    expect(() => lost.check()).toThrow(expect.objectContaining({ code: 'ERR_DEVICE_LOST' }));
    expect(() => lost.check()).toThrow(expect.objectContaining({ code: 'ERR_DEVICE_LOST' }));
  });
});
