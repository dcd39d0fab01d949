/** What the front and the engine process say to each other over the channel of `child_process.fork`. Types only. */
import type { WireFault } from './fault.ts';
import type { DeviceInfo, EngineApi, EngineOptions } from './types.ts';

/** The methods of the engine that can be called from outside its process. */
export type EngineMethod =
  | 'loadModel'
  | 'unloadModel'
  | 'loadAdapter'
  | 'readyAdapters'
  | 'forward'
  | 'stats';

/** Arguments as they are sent: progress callbacks stay behind, `progress` messages stand in for them. */
export type CallArguments = readonly unknown[];

export interface EngineModule {
  readonly Engine: { create(options: EngineOptions): Promise<EngineApi> };
}

export type ToEngine =
  | { readonly kind: 'start'; readonly options: EngineOptions }
  | {
      readonly kind: 'call';
      readonly id: number;
      readonly method: EngineMethod;
      readonly args: CallArguments;
    }
  | { readonly kind: 'close' };

export type FromEngine =
  | { readonly kind: 'ready'; readonly device: DeviceInfo }
  | { readonly kind: 'failed'; readonly fault: WireFault }
  | { readonly kind: 'result'; readonly id: number; readonly value: unknown }
  | { readonly kind: 'error'; readonly id: number; readonly fault: WireFault }
  | {
      readonly kind: 'progress';
      readonly id: number;
      readonly stage: string;
      readonly done: number;
      readonly total: number;
    };
