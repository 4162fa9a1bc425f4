"""What did not run is said aloud, and is a failure where CI is set."""

import os

import pytest

_NAMES = ("1", "true", "yes")


def _ci() -> bool:
    return os.environ.get("CI", "").lower() in _NAMES


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    consequence = "and CI is set: this is a failure" if _ci() else "a landing demands them"
    terminalreporter.section(f"{len(skipped)} tests DID NOT RUN, {consequence}", red=True)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.line(f"{report.nodeid}: {reason}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and _ci() and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
