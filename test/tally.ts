/** Names what failed and what was skipped, and prints the closing line `N passed, N failed[, N skipped]`; collects nothing else. */
import type { Reporter, TestModule } from 'vitest/node';

/** The first line of an error's message. */
const brief = (error: unknown): string =>
  String((error as Error | undefined)?.message ?? error).split('\n', 1)[0] as string;

export default class Tally implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly unknown[]): void {
    const count = { passed: 0, failed: 0, skipped: 0 };
    const fail = (what: string, error: unknown) => {
      count.failed += 1;
      console.log(`failed: ${what}: ${brief(error)}`);
    };
    for (const error of unhandled) fail('outside of any test', error);
    for (const module of modules) {
      const file = module.relativeModuleId;
      const errors = module.errors();
      if (errors.length > 0) fail(file, errors[0]);
      for (const test of module.children.allTests()) {
        const { state, errors } = test.result();
        if (state === 'passed') count.passed += 1;
        else if (state === 'failed') fail(`${file} > ${test.fullName}`, errors[0]);
        else {
          count.skipped += 1;
          console.log(`skipped: ${file} > ${test.fullName}`);
        }
      }
    }
    const skipped = count.skipped > 0 ? `, ${count.skipped} skipped` : '';
    console.log(`${count.passed} passed, ${count.failed} failed${skipped}`);
  }
}
