"""Functional tests call the modules and states through Salt's own loader, inside a host that has the applications.

Each file has a host of each release for itself alone, with systemd, and runs as root in Salt's own Python;
tests/lab/library/inside.py takes it there.
"""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _on_each_release(debian):
    """Let every test here run on each release."""
