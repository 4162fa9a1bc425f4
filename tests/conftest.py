"""What did not run is said aloud, and is a failure where CI is set; what runs side by side."""

import os
from pathlib import Path

import pytest

_NAMES = ("1", "true", "yes")
_TOGETHER = ("cluster", "containers")
"""Folders whose tests share something there is one of: a Slurm, an image."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of a file stay in one process, as their fixtures are made once a file."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = Path(nodeid.split("::")[0])
            return next((part for part in path.parts if part in _TOGETHER), str(path))

    return Together(config, log)


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
