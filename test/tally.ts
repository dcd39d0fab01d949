/** Names what failed and what was skipped, and prints the closing line `N passed, N failed[, N skipped]`; collects nothing else. */
import type { SerializedError } from 'vitest';
import type { Reporter, TestModule } from 'vitest/node';

export default class Tally implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly SerializedError[]): void {
    const count = { passed: 0, failed: 0, skipped: 0 };
    const fail = (what: string, error: SerializedError | undefined) => {
      count.failed += 1;
      console.log(`failed: ${what}: ${error?.message.split('\n', 1)[0]}`);
    };
    for (const error of unhandled) fail('outside of any test', error);
    for (const module of modules) {
      const file = module.relativeModuleId;
      const [error] = module.errors();
      if (error) fail(file, error);
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
