"""Fixtures for tests with virtual machines; see tests/README.md."""

import re

import pytest

from . import library
from .library.room import rooms


@pytest.fixture
def room(debian):
    """A room for the machines of one test."""
    with library.Room(debian) as made:
        yield made


@pytest.fixture
def machine(room):
    """A fresh machine with two empty disks."""
    return room.machine(disks=2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Keep the logs of every machine when a test fails."""
    report = yield
    if report.failed and rooms:
        folder = rooms[-1].save_logs(re.sub(r"[^\w.-]+", "-", item.nodeid))
        report.sections.append(("logs of the machines", str(folder)))
    return report
