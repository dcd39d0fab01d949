/**
 * The order of forwards at the GPU: each is made ready while the one before it runs, and its work is submitted behind that, so that
 * the GPU goes from one to the next without waiting for the CPU. No more than two are on their way. Knows nothing of what they do.
 */

/** A forward as those behind it see it. Neither promise rejects. */
interface Turn {
  readonly submitted: Promise<void>;
  readonly finished: Promise<void>;
}

const OVER: Turn = { submitted: Promise.resolve(), finished: Promise.resolve() };

export class Turns {
  #last = OVER;
  #beforeLast = OVER;

  /**
   * Does `work` once the one before has called `submitted`, or has ended without, and all others before it have ended. Where `work`
   * never calls it, none begins before that has ended.
   */
  take<T>(work: (submitted: () => void) => Promise<T>): Promise<T> {
    const ready = Promise.all([this.#last.submitted, this.#beforeLast.finished]);
    let submit = (): void => {};
    const submitted = new Promise<void>((resolve) => {
      submit = resolve;
    });
    const result = ready.then(() => work(submit));
    const finished = result.then(submit, submit);
    this.#beforeLast = this.#last;
    this.#last = { submitted, finished };
    return result;
  }

  /** Resolves when all that were given until now have ended. */
  async done(): Promise<void> {
    await Promise.all([this.#beforeLast.finished, this.#last.finished]);
  }
}
