"""
One change at a time
====================
"""

import contextlib
import fcntl
import os
import time

from salt.exceptions import CommandExecutionError

__virtualname__ = "ksnap"

LOCK = "/run/lock/ksnap"


def __virtual__():
    return __virtualname__


@contextlib.contextmanager
def locked(timeout=60, recovering=False, test=False):
    """
    Keep other changes out: a context manager for the functions of this module, of no use on the command line.

    timeout
        (number, seconds) How long to wait for another change to end. Default: 60
    recovering
        (bool) Leave an unfinished change as it is. Default: False: finish or undo it first
    test
        (bool) Nothing is to be changed. Default: False

    Raises ``CommandExecutionError`` when another change goes on for longer, and with ``test`` when one was broken off.
    """
    if __context__.get("ksnap.locked") == os.getpid():
        yield
        return
    os.makedirs(os.path.dirname(LOCK), exist_ok=True)
    with open(LOCK, "a+", encoding="utf-8") as file:
        end = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    file.seek(0)
                    raise CommandExecutionError(
                        f"Process {file.read().strip() or '?'} is changing snapshots, and has not ended within "
                        f"{timeout} s. Nothing was done. Wait for it, then try again."
                    ) from error
                time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        __context__["ksnap.locked"] = os.getpid()
        try:
            if test:
                _refuse_unfinished()
            elif not recovering:
                __salt__["ksnap.recover"]()
            yield
        finally:
            __context__.pop("ksnap.locked", None)


def _refuse_unfinished():
    left = __salt__["ksnap.unfinished"]()
    if left:
        raise CommandExecutionError(
            f"A {left[0]['kind']} of {left[0]['stack'] or 'a stack'} was broken off; until it is finished or undone, "
            "nothing can be foretold. Do that: ksnap.recover (any change begins with it)."
        )
