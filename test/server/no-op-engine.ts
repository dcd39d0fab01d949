/**
 * An engine that computes nothing, for measuring what a forward costs beside its computation: it answers each with x itself.
 * Loads the model files of `stand-in-engine.ts`.
 */
import type { Batch, BatchResult } from '../../src/engine/types.ts';
import { StandInEngine } from './stand-in-engine.ts';

export class Engine extends StandInEngine {
  static override create(): Promise<Engine> {
    return Promise.resolve(new Engine());
  }

  override forward({ requests }: Batch): Promise<BatchResult> {
    return Promise.resolve({ outs: requests.map(({ x }) => x), gpuMs: 0 });
  }
}
