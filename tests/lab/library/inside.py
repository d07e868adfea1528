"""Runs tests/functional inside hosts, as a plugin of pytest on both sides.

Outside, the first test of a file makes a host and runs pytest on it for all chosen tests of the file; each test then
reports what its namesake inside reported. One that did not get to its end there is a failure.
"""

import json
import os
import re

import pytest

from .lab import Lab
from .packages import CHECKOUT, RELEASES

# Set inside a host, where tests run as they are.
RELEASE = os.environ.get("LAB_INSIDE")
LAYERS = "+salt+apps+functional"
TESTS = "/srv/xmpp-formula/tests"
REPORTS = "/tmp/reports"
_reports = {}


@pytest.fixture(scope="session", params=[RELEASE] if RELEASE else RELEASES)
def debian(request):
    """The Debian release for this run of the test: each test that asks for it runs once for each."""
    return request.param


def release_of(name):
    """Return the release that the parameters in a test's name tell, or None."""
    found = re.findall(r"\b(" + "|".join(RELEASES) + r")\b", name.partition("[")[2])
    return found[0] if found else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Let a host say how ``item`` went."""
    if RELEASE or CHECKOUT / "tests/functional" not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    batch = item.path, release_of(item.name)
    if batch not in _reports:
        _reports[batch] = run_inside(item.session, *batch)
    output, reports = _reports[batch]
    mine = list(reports.get(item.nodeid, []))
    if "teardown" not in {data["when"] for data in mine}:
        mine.append(missing(item, output))
    for data in mine:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def run_inside(session, path, release):
    """Run the chosen tests of the file ``path`` on a host of ``release``; return its output and the reports by test."""
    chosen = [item.nodeid for item in session.items if item.path == path and release_of(item.name) == release]
    with Lab() as lab:
        host = lab.host("functional.example.org", layers=release + LAYERS)
        done = host.run(
            "/opt/salt-xmpp/bin/python3", "-m", "pytest", f"--config-file={TESTS}/pytest.ini", f"--rootdir={TESTS}",
            *(f"{TESTS}/{name}" for name in chosen),
            env={"LAB_INSIDE": release, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=1800, check=False,
        )  # fmt: skip
        lines = host.sh(f"cat {REPORTS} || true").stdout.splitlines()
        reports = {}
        for data in map(json.loads, lines):
            reports.setdefault(data["nodeid"], []).append(data)
        failed = [data for data in map(json.loads, lines) if data["outcome"] == "failed"]
        if failed or done.returncode:
            folder = lab.save_logs(f"{path.stem}-{release}")
            for data in failed:
                for each in reports[data["nodeid"]]:
                    each["sections"].append(("logs of the host", str(folder)))
    return done.stdout + done.stderr, reports


def missing(item, output):
    """Return the report of a test that did not get to its end inside."""
    report = pytest.TestReport(
        item.nodeid,
        item.location,
        {},
        "failed",
        f"It did not get to its end inside the host. pytest there said:\n{output[-6000:]}",
        "call",
    )
    return item.config.hook.pytest_report_to_serializable(config=item.config, report=report)


def pytest_runtest_logreport(report):
    """Inside: keep each report where the process outside reads it."""
    if RELEASE:
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        with open(REPORTS, "a") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config):
    """Remember the configuration, which the hook above is not given."""
    global _config
    _config = config
