"""
How a replica stands, and whether it is what it should be
=========================================================
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

RUN = "/run/zfs_dr"
SHOWN = 20  # files that are named where contents differ


def __virtual__():
    return __virtualname__


def _running(target, stack):
    # What a dead replication left does not count: only a living one has the lock.
    try:
        with open(os.path.join(RUN, f"{target['id']}-{stack}.lock"), encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return __salt__["zfs_dr.noted"](target, stack, "running") or {"bytes": 0, "rate": 0.0, "left": None}
    return None


def status(stack, target):
    """
    Tell how a stack stands at a target. It waits for no replication that runs.

    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it.

    Returns a dict:

    - ``reachable`` (bool) and, where it is not, ``reason``
    - ``snapshot``: the newest set that is whole at the target, or ``None``; ``age``: seconds since it was taken, which
      is what a loss of the source now would cost (the RPO)
    - ``sets``: how many are whole there
    - ``behind``: bytes that were written at the source since then
    - ``running``: ``None``, or a dict of ``bytes``, ``expected``, ``rate`` (bytes a second), ``left`` (seconds),
      ``done`` and ``streams``
    - ``error``: what the last replication failed with, or ``None``; ``failed``: when; ``done``: when the last one
      succeeded
    - ``extra``: replicas of the stack whose datasets are not in it any more

    Raises ``SaltInvocationError`` for a wrong stack or target.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.status web vault
    """
    target = __salt__["zfs_dr.target"](target)
    name, datasets, _ = __salt__["zfs_dr.members"](stack, target)
    last = __salt__["zfs_dr.noted"](target, name)
    told = {
        "reachable": True,
        "snapshot": None,
        "age": None,
        "sets": 0,
        "behind": None,
        "running": _running(target, name),
        "error": last.get("error"),
        "failed": last.get("failed"),
        "done": last.get("done"),
        "extra": [],
    }
    try:
        source, there = _both(target, datasets)
    except CommandExecutionError as error:
        return {**told, "reachable": False, "reason": str(error)}
    # What was set aside since, after a rollback, is not whole any more.
    whole = [each for each in there["sets"] if each["stack"] == name and not _incomplete(name, each, there)]
    told["sets"] = len(whole)
    own = {dataset.replace("/", ":") for dataset in datasets}
    told["extra"] = sorted(
        replica
        for replica, entry in there["replicas"].items()
        if entry["stack"] == name and replica not in own and not __salt__["zfs_dr.beside"](replica)[1]
    )
    if whole:
        newest = whole[-1]
        members = [s for each in there["replicas"].values() for s in each["snapshots"] if s["name"] == newest["name"]]
        taken = min((each["creation"] for each in members), default=newest["creation"])
        told.update(snapshot=newest["name"], age=time.time() - taken)
    told["behind"] = sum(_behind(entry, told["snapshot"]) for entry in source.values())
    return told


def _both(target, datasets):
    sides = __salt__["zfs_dr.connect"](target)
    try:
        return __salt__["zfs_dr.listings"](sides, datasets, target["dataset"])
    finally:
        __salt__["zfs_dr.disconnect"](sides)


def _behind(entry, snapshot):
    marks = {mark["name"].rpartition("zfs_dr-")[2].partition("-ksnap-")[2]: mark for mark in entry["bookmarks"]}
    known = {each["name"]: each for each in entry["snapshots"]}
    first = known.get(snapshot) or marks.get((snapshot or "").removeprefix("ksnap-"))
    if first is None:
        return entry["referenced"]
    return entry["written"] + sum(s["written"] for s in entry["snapshots"] if s["createtxg"] > first["createtxg"])


def verify(stack, target, contents=False, checksums=None):
    """
    Compare both sides.

    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it.
    contents
        (bool) Read every file of the newest whole set on both sides, each from a clone of its own, and compare their
        checksums. Both sides must be on this machine; else see ``checksums``. Encrypted replicas need their key
        loaded. Default: False.
    checksums
        (dict) What :func:`checksums_of_set` returned on the other machine for the same set, to be compared with this
        one's.

    Returns a dict: ``ok`` (bool), ``problems`` (a list of sentences), ``snapshot`` (the newest whole set), ``sets``
    and ``snapshots`` (how many were compared), ``files`` and ``bytes`` (read here; 0 without contents).

    Raises ``CommandExecutionError`` when a side cannot be read, ``SaltInvocationError`` when contents cannot be
    compared from here.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.verify web vault contents=True
    """
    target = __salt__["zfs_dr.target"](target)
    name, datasets, _ = __salt__["zfs_dr.members"](stack, target)
    if contents and target["ssh"]:
        raise SaltInvocationError(
            "The files of the other machine cannot be read from here, as the key may only replicate. Call "
            "zfs_dr.checksums_of_set there, by Salt, and give what it returns as checksums."
        )
    source, there = _both(target, datasets)
    problems, compared = [], 0
    for dataset, entry in source.items():
        replica = there["replicas"].get(dataset.replace("/", ":"))
        if replica is None:
            problems.append(f"{dataset} has no replica in {target['dataset']}: replicate")
            continue
        known = {each["name"]: each["guid"] for each in entry["snapshots"]}
        for each in replica["snapshots"]:
            if each["name"] in known:
                compared += 1
                if known[each["name"]] != each["guid"]:
                    problems.append(
                        f"{dataset}@{each['name']} is another snapshot than that of its replica: replicate again"
                    )
        if replica["written"] and replica["snapshots"]:
            problems.append(f"the replica of {dataset} was written to: replicate again, which sets that aside")
    whole = [each for each in there["sets"] if each["stack"] == name]
    problems += [problem for each in whole if (problem := _incomplete(name, each, there))]
    whole = [each for each in whole if not _incomplete(name, each, there)]
    done = {"files": 0, "bytes": 0}
    newest = whole[-1]["name"] if whole else None
    if newest is None:
        problems.append(f"no set of {name} is whole in {target['dataset']}: replicate")
    elif contents or checksums:
        here = __salt__["zfs_dr.checksums_of_set"](datasets, newest)
        other = checksums or __salt__["zfs_dr.checksums_of_set"](
            [f"{target['dataset']}/{dataset.replace('/', ':')}" for dataset in datasets], newest
        )
        done = {key: sum(each[key] for each in here.values()) for key in done}
        problems += _differences(
            here, {key.rpartition("/")[2].replace("/", ":"): value for key, value in other.items()}
        )
    return {
        "ok": not problems,
        "problems": problems,
        "snapshot": newest,
        "sets": len(whole),
        "snapshots": compared,
        **done,
    }


def _incomplete(stack, mark, there):
    has = sum(
        mark["name"] in [s["name"] for s in entry["snapshots"]]
        for name, entry in there["replicas"].items()
        if entry["stack"] == stack and __salt__["zfs_dr.beside"](name)[1] != "aside"
    )
    if has < mark["members"]:
        return f"{mark['name']} was whole and is not any more: {has} of {mark['members']} datasets have it"
    return None


def _differences(here, there):
    for dataset, mine in here.items():
        other = there.get(dataset.replace("/", ":"))
        if other is None:
            yield f"the checksums of {dataset} are missing from the other side's"
        elif mine["sha256"] != other["sha256"]:
            names = sorted(
                name
                for name in mine["names"].keys() | other["names"].keys()
                if mine["names"].get(name) != other["names"].get(name)
            )
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"{dataset} differs from its replica in {', '.join(names[:SHOWN])}{more}"


def checksums_of_set(datasets, snapshot):
    """
    Read every file of some datasets as they were at a snapshot, from clones that are mounted where nobody looks.

    datasets
        (list of strings) Their names: those of the source, or of the replicas.
    snapshot
        (string) The name of the set, what is after the @.

    Returns a dict, dataset to ``files`` (number), ``bytes``, ``sha256`` (over all of it: names, types, modes, owners,
    contents) and ``names`` (a dict, path to checksum). A volume is read as one file.

    Raises ``CommandExecutionError`` when a snapshot does not exist, or its key is not loaded.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.checksums_of_set '[backup/web1/tank:web]' ksnap-20261125T222408.123456Z-0a1b2c3d
    """
    return {dataset: _checksums(dataset, snapshot) for dataset in datasets}


def _checksums(dataset, snapshot):
    zfs = __salt__["ksnap.command"]
    pool = dataset.partition("/")[0]
    for left in zfs(["zfs", "list", "-H", "-d", "1", "-o", "name", pool]).split():
        # A power cut may have left one, and nobody else is reading now: what a reader has mounted cannot be destroyed.
        if left.startswith(f"{pool}/zfs_dr-verify-"):
            with contextlib.suppress(CommandExecutionError):
                zfs(["zfs", "destroy", left])
    kind, key = zfs(["zfs", "get", "-Hp", "-o", "value", "type,keystatus", dataset]).split()
    if key == "unavailable":
        raise CommandExecutionError(
            f"The key of {dataset} is not loaded, so its files cannot be read. zfs load-key {dataset}"
        )
    clone = f"{pool}/zfs_dr-verify-{secrets.token_hex(4)}"
    options = ["-o", "readonly=on", "-o", "zfs_dr:rehearsal=verify"]
    if kind == "volume":
        zfs(["zfs", "clone", *options, "-o", "volmode=dev", f"{dataset}@{snapshot}", clone])
        try:
            return _read_volume(f"/dev/zvol/{clone}")
        finally:
            zfs(["zfs", "destroy", clone])
    with tempfile.TemporaryDirectory(prefix="zfs_dr-") as place:
        zfs(
            [
                "zfs",
                "clone",
                *options,
                "-o",
                "canmount=noauto",
                "-o",
                f"mountpoint={place}",
                f"{dataset}@{snapshot}",
                clone,
            ]
        )
        try:
            zfs(["zfs", "mount", clone])
            return _read_tree(place)
        finally:
            zfs(["zfs", "destroy", "-f", clone])


def _read_volume(path):
    end = time.monotonic() + 30
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.05)
    digest, size = _digest_of(path)
    return _summed({"volume": digest}, 1, size)


def _read_tree(root):
    names, files, size = {}, 0, 0
    for folder, folders, inside in os.walk(root):
        for name in [".", *inside, *(each for each in folders if os.path.islink(os.path.join(folder, each)))]:
            path = os.path.normpath(os.path.join(folder, name))
            seen = os.lstat(path)
            what = [stat.filemode(seen.st_mode), seen.st_uid, seen.st_gid]
            if stat.S_ISLNK(seen.st_mode):
                what.append(os.readlink(path))
            elif stat.S_ISREG(seen.st_mode):
                digest, length = _digest_of(path)
                what.append(digest)
                files, size = files + 1, size + length
            shown = os.path.relpath(path, root).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            names[shown] = hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()
    return _summed(names, files, size)


def _digest_of(path):
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def _summed(names, files, size):
    text = json.dumps(sorted(names.items()))
    return {"files": files, "bytes": size, "sha256": hashlib.sha256(text.encode()).hexdigest(), "names": names}
