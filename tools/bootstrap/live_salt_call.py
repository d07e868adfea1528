"""
salt-call, with a window in it: it writes a line of JSON to $PROGRESS_FD when a state begins and when it ends, and what
a program said that failed (Salt's states often say no more than that it did).

Runs in Salt's own Python. A minion without a master fires no events while states run, so the two methods of Salt's
State that see every state are wrapped. Where a Salt has them under other names, it runs as ever, and shows nothing.
"""

import contextlib
import functools
import json
import logging
import os
import sys


def main():
    descriptor = int(os.environ.pop("PROGRESS_FD"))
    os.set_inheritable(descriptor, False)

    def tell(**fact):
        os.write(descriptor, json.dumps(fact).encode() + b"\n")

    del sys.path[0]  # this directory, whose modules are for another Python
    import salt.scripts
    import salt.state

    wrap(salt.state.State, "call", lambda low, *_, **__: tell(begins=low.get("__id__"), what=what(low)))
    wrap(
        salt.state.State,
        "event",
        lambda ret, total, *_, **__: tell(
            ended=ret.get("__id__"),
            name=str(ret.get("name")),
            total=total,
            result=ret.get("result"),
            changed=bool(ret.get("changes")),
            milliseconds=ret.get("duration", 0),
            skipped=not ret.get("__state_ran__", True),
        ),
    )
    logging.getLogger().addHandler(Said(tell))
    sys.argv[0] = "salt-call"
    salt.scripts.salt_call()


class Said(logging.Handler):
    """Hands on the output of failed programs, which Salt's cmdmod logs as errors."""

    def __init__(self, tell):
        super().__init__(logging.ERROR)
        self.tell = tell

    def emit(self, record):
        text = record.getMessage()
        if "cmdmod" in record.name and text.startswith(("stdout: ", "stderr: ")):
            self.tell(said=text.partition(": ")[2][-2000:])


def what(low):
    return "{}.{}".format(low.get("state"), low.get("fun"))


def wrap(owner, name, look):
    method = getattr(owner, name, None)
    if method is None:
        return

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with contextlib.suppress(Exception):  # what is shown must never be in the way of what is done
            look(*args, **kwargs)
        return method(self, *args, **kwargs)

    setattr(owner, name, wrapped)


main()
