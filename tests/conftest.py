"""Fixtures for all tests; what runs where is in tests/README.md."""

import pytest

from tests.lab.library import Lab

pytest_plugins = ["tests.lab.library.inside", "tests.lab.library.report", "tests.vm.ksnap", "tests.vm.zfs_dr"]


@pytest.fixture(scope="module")
def lab():
    """A lab for the tests of one file. Whoever makes a host destroys it: tests of the next release may follow."""
    with Lab() as made:
        yield made


def pytest_unconfigure():
    """Drop what Salt keeps of the log for a handler to come: at exit it would write it to a stream that is closed."""
    from salt._logging import shutdown_temp_handler

    shutdown_temp_handler()
