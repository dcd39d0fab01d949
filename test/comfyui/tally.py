"""A pytest plugin that names what failed and prints `N passed, N failed[, N skipped]`, as test/tally.ts does."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Errors outside of tests, of fixtures for example, count as failures."""
    for report in (*terminalreporter.stats.get("failed", ()), *terminalreporter.stats.get("error", ())):
        terminalreporter.write_line(f"failed: {report.nodeid}")
    count = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    terminalreporter.write_line(f"\n{count['passed']} passed, {count['failed'] + count['error']} failed{skipped}")
