/**
 * An engine that is watched: the same engine, with its forwards counted and its loads written to the log. Changes neither what
 * goes in nor what comes out.
 */
import { imagesIn } from '../engine/check.ts';
import type { EngineApi } from '../engine/types.ts';
import type { Logger } from './log.ts';
import type { Metrics } from './metrics.ts';

export function watched(engine: EngineApi, metrics: Metrics, log: Logger): EngineApi {
  return {
    // Another one after a restart, perhaps.
    get device() {
      return engine.device;
    },
    loadModel: async (source, dtype, progress) => {
      const started = performance.now();
      const info = await engine.loadModel(source, dtype, progress);
      const { model, sizeBytes } = info;
      log.info({ model, dtype: info.dtype, sizeBytes, ms: since(started) }, 'model loaded');
      return info;
    },
    unloadModel: async (model) => {
      await engine.unloadModel(model);
      log.info({ model }, 'model unloaded');
    },
    loadAdapter: async (source, model) => {
      const started = performance.now();
      const info = await engine.loadAdapter(source, model);
      const { rank, sizeBytes, unmatched } = info;
      const facts = { lora: source.name, model, rank, sizeBytes, unmatched: unmatched.length };
      log.debug({ ...facts, ms: since(started) }, 'LoRA loaded');
      return info;
    },
    readyAdapters: (model, loras) => engine.readyAdapters(model, loras),
    forward: async (batch) => {
      const started = performance.now();
      const result = await engine.forward(batch);
      metrics.stepped({
        model: batch.model,
        requests: batch.requests.length,
        images: imagesIn(batch.requests),
        gpuMs: result.gpuMs,
        elapsedMs: performance.now() - started,
      });
      return result;
    },
    stats: () => engine.stats(),
    close: () => engine.close(),
  };
}

function since(started: number): number {
  return Math.round(performance.now() - started);
}
