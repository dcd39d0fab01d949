/** Buffers that patching works in, shared by all models of a device since forwards run one after another. Owns them. */
import { Arena } from '../gpu/arena.ts';
import type { Device } from '../gpu/device.ts';
import type { Resident } from '../gpu/kernel.ts';
import { Recorder } from '../gpu/recorder.ts';
import type { Work } from './patch.ts';

export type WorkName = keyof Work<unknown>;

export class PatchWork {
  readonly arenas: Work<Arena>;
  /** Where what has no room of its own is made, again at each use: a weight or norm's weight, and a bias. */
  readonly passing: { readonly weight: Arena; readonly bias: Arena };
  readonly recorder: Recorder;

  constructor(device: Device) {
    const arena = (label: string): Arena => new Arena(device, `patch ${label}`);
    this.arenas = {
      weight: arena('weight'),
      sum: arena('sum'),
      first: arena('first'),
      second: arena('second'),
      scales: arena('scales'),
    };
    this.passing = { weight: arena('passing weight'), bias: arena('passing bias') };
    this.recorder = new Recorder(device, 'patch params');
  }

  get sizeBytes(): number {
    return this.#all().reduce((sum, arena) => sum + arena.sizeBytes, 0);
  }

  operands(): Work<Resident> {
    const { weight, sum, first, second, scales } = this.arenas;
    return {
      weight: weight.operand,
      sum: sum.operand,
      first: first.operand,
      second: second.operand,
      scales: scales.operand,
    };
  }

  close(): void {
    for (const arena of this.#all()) arena.close();
    this.recorder.close();
  }

  #all(): readonly Arena[] {
    return [...Object.values(this.arenas), ...Object.values(this.passing)];
  }
}
