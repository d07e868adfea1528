"""
What has changed since a snapshot
=================================
"""

import re

from salt.exceptions import CommandExecutionError

__virtualname__ = "ksnap"


def __virtual__():
    return __virtualname__


def diff(stack, snapshot, to=None, depth=2):
    """
    Tell what has changed since a snapshot, summed by path (zfs-diff(8)).

    stack
        (string or dict) The stack.
    snapshot
        (string) The older snapshot's name or label.
    to
        (string) The newer one's. Default: the present state
    depth
        (integer) How many parts of a path to sum by, below the mount point. Default: 2

    Returns a dict of each dataset to a dict of paths, each to a dict of ``added``, ``removed``, ``modified`` and
    ``renamed``: numbers of files and directories.

    Raises ``CommandExecutionError`` for a dataset that is not mounted; volumes are left out.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.diff mail before-upgrade
    """
    older = __salt__["ksnap.find"](stack, snapshot)
    newer = __salt__["ksnap.find"](stack, to)["snapshot"] if to else None
    changes = {}
    places = _places(sorted(older["datasets"]))
    for dataset, place in places.items():
        shown = _zfs("diff", "-H", f"{dataset}@{older['snapshot']}", f"{dataset}@{newer}" if newer else dataset)
        sums = changes.setdefault(dataset, {})
        for line in shown.splitlines():
            kind, path, *_ = line.split("\t")
            inside = _plain(path).removeprefix(place.rstrip("/")).strip("/")
            parts = inside.split("/")[:depth] if inside else []
            key = "/".join([place.rstrip("/"), *parts]) or "/"
            word = {"+": "added", "-": "removed", "M": "modified", "R": "renamed"}[kind]
            entry = sums.setdefault(key, {"added": 0, "removed": 0, "modified": 0, "renamed": 0})
            entry[word] += 1
    return changes


def _places(datasets):
    shown = _zfs("list", "-H", "-p", "-t", "filesystem,volume", "-o", "name,type,mounted", *datasets)
    mounts = {mount["source"]: mount["path"] for mount in __salt__["ksnap.mounts"]() if mount["type"] == "zfs"}
    places = {}
    for line in shown.splitlines():
        name, kind, mounted = line.split("\t")
        if kind == "volume":
            continue
        if mounted != "yes" or name not in mounts:
            raise CommandExecutionError(f"{name} is not mounted; zfs diff needs that (zfs mount {name}).")
        places[name] = mounts[name]
    return places


def _plain(text):
    # zfs diff writes the bytes of other characters than ASCII's printable ones, and of spaces, in octal.
    data = re.sub(rb"\\0?([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text.encode("utf-8", "surrogateescape"))
    return data.decode("utf-8", "replace")


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])
