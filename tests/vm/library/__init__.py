"""The machine room: virtual machines with OpenZFS for tests. See tests/README.md."""

from .machine import CommandError, Machine, PowerCut
from .room import Room

__all__ = ["CommandError", "Machine", "PowerCut", "Room"]
