"""Fixtures for tests that need the whole service; how it gets there is in service.py."""

import pytest

from . import clients
from . import service as library


@pytest.fixture(scope="module")
def converged(lab, debian):
    """The disk of a machine with the service of pillar.example (see ``service.converged``)."""
    return library.converged(lab, debian)


@pytest.fixture(scope="module")
def service(lab, converged):
    """A machine with the service of pillar.example, up, for the tests of one file: they leave it as they found it."""
    machine = library.host(lab, converged["layers"])
    yield machine
    machine.destroy()


@pytest.fixture(scope="module")
def outside(service):
    """Somebody on another machine, who trusts the machine's certificate authority."""
    return clients.Outside(service.read("/etc/ssl/xmpp/ca.crt"))
