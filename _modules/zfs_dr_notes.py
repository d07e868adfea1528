"""
What is noted of a replication: for the next one, for status, and for Salt's bus
================================================================================

``/run/zfs_dr/<target>-<stack>.running`` tells of one that is at work, ``/var/lib/zfs_dr/<target>-<stack>.last`` how the
last one ended. Nothing depends on them: without, the next replication looks closer.
"""

import contextlib
import glob
import json
import os
import sys
import time

__virtualname__ = "zfs_dr"

RUN = "/run/zfs_dr"
STATE = "/var/lib/zfs_dr"


def __virtual__():
    return __virtualname__


def _path(target, stack, kind):
    return os.path.join(RUN if kind == "running" else STATE, f"{target['id']}-{stack}.{kind}")


def noted(target, stack, kind="last"):
    """
    Tell what was noted of a replication.

    target
        (dict) As :func:`zfs_dr_side.target` returns it.
    stack
        (string) The stack's name.
    kind
        (string) ``last``, or ``running`` (which one that was killed leaves behind). Default: ``last``.

    Returns a dict, empty where nothing was noted. Of the last one: ``snapshot``, ``bytes``, ``seconds``, ``taken`` and
    ``done`` (seconds since the epoch), ``guids`` (dataset to guid), ``state`` (as :func:`zfs_dr_side.state` returns
    it), ``error`` and ``failed``. Of one that runs: what :func:`progress` writes.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.noted '{id: vault}' web
    """
    try:
        with open(_path(target, stack, kind), encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return {}


def note(target, stack, data, kind="last"):
    """
    Note something of a replication, or forget it.

    target
        (dict) As :func:`zfs_dr_side.target` returns it.
    stack
        (string) The stack's name.
    data
        (dict or None) As :func:`noted` returns it; ``None`` forgets.
    kind
        (string) ``last`` or ``running``. Default: ``last``.

    CLI Example: none; :func:`zfs_dr.replicate` does it.
    """
    path = _path(target, stack, kind)
    if data is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(data, file)
    os.replace(f"{path}.new", path)


def progress(target, stack, snapshot):
    """
    Make what :func:`zfs_dr_stream.streams` calls while it moves something.

    target
        (dict) As :func:`zfs_dr_side.target` returns it.
    stack
        (string) The stack's name.
    snapshot
        (string) The set that is under way.

    Returns a function. It notes, fires as ``zfs_dr/<target>/<stack>/progress`` and shows on a terminal what it is
    called with, and adds ``snapshot``, ``rate`` (bytes a second), ``left`` (seconds, or ``None``) and ``time``.

    CLI Example: none.
    """

    def tell(data):
        rate = data["bytes"] / data["seconds"] if data["seconds"] else 0.0
        left = (data["expected"] - data["bytes"]) / rate if rate else None
        data = {**data, "snapshot": snapshot, "rate": rate, "left": left, "time": time.time()}
        note(target, stack, data, "running")
        fire(target, stack, "progress", data)
        if sys.stderr.isatty():
            share = 100 * data["bytes"] // (data["expected"] or 1)
            sys.stderr.write(
                f"\r{stack} to {target['id']}: {data['done']} of {data['streams']} datasets, "
                f"{data['bytes'] >> 20} MiB, {share} %, {rate / 1048576:.1f} MiB/s "
            )
            if data["done"] == data["streams"]:
                sys.stderr.write("\n")
            sys.stderr.flush()

    return tell


def fire(target, stack, what, data):
    """
    Tell Salt's bus something of a replication.

    target
        (dict) As :func:`zfs_dr_side.target` returns it.
    stack
        (string) The stack's name.
    what
        (string) The end of the tag: ``zfs_dr/<target>/<stack>/<what>``.
    data
        (dict) What the event has.

    CLI Example: none; :func:`zfs_dr.replicate` does it.
    """
    # Without a minion there is no bus, and Salt would look for it for a second each time. Nor is it a failure of a
    # replication that nobody listens.
    if glob.glob(os.path.join(glob.escape(__opts__["sock_dir"]), "minion_event_*_pull.ipc")):
        with contextlib.suppress(Exception):
            __salt__["event.fire"](data, f"zfs_dr/{target['id']}/{stack}/{what}")
