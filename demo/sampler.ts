/**
 * The client's half of diffusion: noise, the sigma schedule, DPM++ 2M and classifier-free guidance, on plain arrays.
 * Asks someone else for every forward; knows no sockets, no prompts and no pictures.
 */

/** Rows in, predicted noise out: `x` is [rows, ...] scaled by 1 / sqrt(sigma^2 + 1), `timestep` is the same for all rows. */
export type Forward = (x: Float32Array, timestep: number) => Promise<Float32Array>;

export interface Schedule {
  /** [steps], as the UNet's time embedding takes them. */
  readonly timesteps: readonly number[];
  /** [steps + 1], falling to 0. */
  readonly sigmas: readonly number[];
}

const TRAIN_STEPS = 1000;
/** Stable Diffusion's scaled-linear betas (Rombach et al. 2022, arXiv:2112.10752). */
const BETA_START = 0.00085;
const BETA_END = 0.012;

/** Predictions of the clean picture further out than this are noise, and pulled back. */
const CLEAN_LIMIT = 1.5;

/** Evenly spaced timesteps from 999 to 0, with the sigma of each: sqrt((1 - abar) / abar). */
export function schedule(steps: number): Schedule {
  const sigmas: number[] = [];
  let alphaBar = 1;
  for (let i = 0; i < TRAIN_STEPS; i++) {
    const part = i / (TRAIN_STEPS - 1);
    alphaBar *= 1 - (Math.sqrt(BETA_START) * (1 - part) + Math.sqrt(BETA_END) * part) ** 2;
    sigmas.push(Math.sqrt((1 - alphaBar) / alphaBar));
  }
  const timesteps = Array.from({ length: steps }, (_, i) =>
    Math.round((TRAIN_STEPS - 1) * (steps === 1 ? 1 : 1 - i / (steps - 1))),
  );
  return { timesteps, sigmas: [...timesteps.map((t) => sigmas[t]!), 0] };
}

/** `length` standard normal values from a seed (mulberry32, Box-Muller): the same everywhere. */
export function gaussian(length: number, seed: number): Float32Array {
  let state = seed >>> 0;
  const uniform = (): number => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const out = new Float32Array(length);
  for (let i = 0; i < length; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    const angle = 2 * Math.PI * uniform();
    out[i] = radius * Math.cos(angle);
    if (i + 1 < length) out[i + 1] = radius * Math.sin(angle);
  }
  return out;
}

export interface SampleOptions {
  /** Elements of all pictures together. */
  readonly length: number;
  readonly seed: number;
  readonly steps: number;
  /** Guidance scale; 1 means the conditional prediction alone. */
  readonly guidance: number;
  readonly onStep?: (done: number) => void;
}

/**
 * Pictures in [-1, 1], by DPM++ 2M (Lu et al. 2022, arXiv:2211.01095) on an eps-predicting model. Each forward gets
 * 2 * length elements: all pictures for the conditional rows, then the same ones for the unconditional rows.
 */
export async function sample(forward: Forward, options: SampleOptions): Promise<Float32Array> {
  const { length, steps, guidance } = options;
  const { timesteps, sigmas } = schedule(steps);
  const x = gaussian(length, options.seed);
  for (let i = 0; i < length; i++) x[i]! *= sigmas[0]!;
  let previous: Float32Array | null = null;
  for (let step = 0; step < steps; step++) {
    const sigma = sigmas[step]!;
    const next = sigmas[step + 1]!;
    const clean = guided(await forward(paired(x, sigma), timesteps[step]!), x, sigma, guidance);
    if (next === 0) x.set(clean);
    else advance(x, clean, previous, [step === 0 ? sigma : sigmas[step - 1]!, sigma, next]);
    previous = clean;
    options.onStep?.(step + 1);
  }
  return x.map((value) => Math.min(1, Math.max(-1, value)));
}

/** What the UNet sees: the scaled picture twice. */
function paired(x: Float32Array, sigma: number): Float32Array {
  const scale = 1 / Math.sqrt(sigma * sigma + 1);
  const rows = new Float32Array(2 * x.length);
  for (let i = 0; i < x.length; i++) rows[i] = rows[x.length + i] = x[i]! * scale;
  return rows;
}

/** The clean picture that the guided noise prediction implies. */
function guided(eps: Float32Array, x: Float32Array, sigma: number, guidance: number): Float32Array {
  return x.map((value, i) => {
    const free = eps[x.length + i]!;
    const clean = value - sigma * (free + guidance * (eps[i]! - free));
    return Math.min(CLEAN_LIMIT, Math.max(-CLEAN_LIMIT, clean));
  });
}

/** One second-order multistep update of `x`, in place; first order where there is no previous prediction. */
function advance(
  x: Float32Array,
  clean: Float32Array,
  previous: Float32Array | null,
  [before, sigma, next]: readonly [number, number, number],
): void {
  const h = Math.log(sigma / next);
  const extra = previous === null ? 0 : h / (2 * Math.log(before / sigma));
  for (let i = 0; i < x.length; i++) {
    const slope = previous === null ? clean[i]! : (1 + extra) * clean[i]! - extra * previous[i]!;
    x[i] = (next / sigma) * x[i]! - Math.expm1(-h) * slope;
  }
}
