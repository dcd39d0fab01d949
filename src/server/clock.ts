/** Time as the server uses it, so that tests can pass their own. Monotonic milliseconds, not the time of day. */
export interface Clock {
  now(): number;
  /** Calls `action` once after `ms`; the result cancels that. */
  after(ms: number, action: () => void): () => void;
}

export const SYSTEM_CLOCK: Clock = {
  now: () => performance.now(),
  after: (ms, action) => {
    const timer = setTimeout(action, ms);
    return () => clearTimeout(timer);
  },
};
