"""The lab: real Debian hosts for tests, in namespaces of the run's own. See tests/README.md."""

from .host import CommandError, Host
from .lab import Lab, frozen
from .packages import CHECKOUT, RELEASES

__all__ = ["CHECKOUT", "RELEASES", "CommandError", "Host", "Lab", "frozen"]
