/**
 * Entry of the engine process: makes the engine of the module named by its first argument and answers the calls of
 * `EngineProcess`. Holds no state but that engine, and ends when the front does.
 */
import { toFault } from './fault.ts';
import type { EngineMethod, EngineModule, FromEngine, ToEngine } from './messages.ts';
import type { EngineApi, Progress } from './types.ts';

function send(message: FromEngine): void {
  if (process.connected) process.send?.(message);
}

async function start(
  modulePath: string,
  message: ToEngine & { readonly kind: 'start' },
): Promise<EngineApi | null> {
  try {
    const module = (await import(modulePath)) as EngineModule;
    const engine = await module.Engine.create(message.options);
    send({ kind: 'ready', device: engine.device });
    return engine;
  } catch (error) {
    send({ kind: 'failed', fault: toFault(error) });
    return null;
  }
}

async function call(
  engine: EngineApi,
  id: number,
  method: EngineMethod,
  args: readonly unknown[],
): Promise<void> {
  try {
    const progress: Progress = (stage, done, total) => send({ kind: 'progress', id, stage, done, total });
    const all = method === 'loadModel' ? [...args, progress] : args;
    // The front's types hold the arguments to the method; here they have come through a channel.
    const run = engine[method] as (...all: readonly unknown[]) => Promise<unknown>;
    const value = await run.apply(engine, all as unknown[]);
    send({ kind: 'result', id, value });
  } catch (error) {
    send({ kind: 'error', id, fault: toFault(error) });
  }
}

function main(modulePath: string): void {
  let engine: Promise<EngineApi | null> = Promise.resolve(null);
  process.on('message', (message: ToEngine) => {
    if (message.kind === 'start') engine = start(modulePath, message);
    else if (message.kind === 'call') {
      void engine.then((ready) => ready && call(ready, message.id, message.method, message.args));
    } else {
      void engine
        .then((ready) => ready?.close())
        .catch(() => {})
        .finally(() => process.exit(0));
    }
  });
  process.on('disconnect', () => process.exit(0));
  // Ctrl-C reaches the whole process group; the front decides when the engine ends.
  process.on('SIGINT', () => {});
  process.on('SIGTERM', () => {});
}

const modulePath = process.argv[2];
if (modulePath === undefined || process.send === undefined) {
  process.stderr.write('This is the entry of the engine process; run "unetd serve" instead.\n');
  process.exit(1);
}
main(modulePath);
