"""The files of the module ksnap, each loaded with the others' functions that it calls."""

import pytest

from tests.unit.ejabberd.conftest import load  # noqa: F401


@pytest.fixture
def zfs():
    """What ``ksnap.command`` was called with, and what it answers: a list of calls, and a dict by the first words."""

    class Zfs:
        def __init__(self):
            self.calls, self.answers = [], {}

        def __call__(self, argv, stdin=None):
            self.calls.append(argv)
            for words, answer in self.answers.items():
                if " ".join(argv).startswith(words):
                    if isinstance(answer, Exception):
                        raise answer
                    return answer(argv) if callable(answer) else answer
            return ""

    return Zfs()
