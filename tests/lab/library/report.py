"""What a run says of itself: which suite ran, how long, what was skipped. A plugin of pytest."""

import collections
import os
import re

import pytest
from xdist.scheduler import LoadScopeScheduling

from . import inside, lab

SUITES = ("unit", "functional", "lab", "vm")
COLUMNS = ("passed", "failed", "skipped")
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Keep the logs of every host when a test fails."""
    report = yield
    if report.failed and lab.active:
        folder = lab.active[-1].save_logs(re.sub(r"[^\w.-]+", "-", item.nodeid))
        report.sections.append(("logs of the hosts", str(folder)))
    return report


def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file and release together: they share hosts."""

    class ByFileAndRelease(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return f"{file} {inside.release_of(test)}"

    return ByFileAndRelease(config, log)


def pytest_terminal_summary(terminalreporter):
    """Print the table."""
    if inside.RELEASE:
        return
    count, seconds, skips = collections.Counter(), collections.Counter(), collections.Counter()
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            suite = report.nodeid.split("/")[0]
            count[
                suite, "failed" if outcome in ("error", "xpassed") else "passed" if outcome == "xfailed" else outcome
            ] += 1
            if outcome == "skipped":
                reason = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else report.longrepr
                skips[f"{suite}: {reason}"] += 1
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if hasattr(report, "duration") and hasattr(report, "nodeid"):
            seconds[report.nodeid.split("/")[0]] += report.duration
    terminalreporter.section("what ran")
    terminalreporter.write_line(f"{'suite':12}" + "".join(f"{name:>9}" for name in COLUMNS) + "     time")
    for suite in SUITES:
        row = "".join(f"{count[suite, name]:9}" for name in COLUMNS)
        ran = any(count[suite, name] for name in COLUMNS)
        terminalreporter.write_line(f"{suite:12}{row}  {seconds[suite]:5.0f} s" if ran else f"{suite:12}  not run")
    for reason, number in skips.items():
        terminalreporter.write_line(f"skipped {number}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """In CI, let a run that skipped something fail."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if IN_CI and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("\nIn CI a skipped test is a failure.", red=True)
