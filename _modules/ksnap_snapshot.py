"""
Snapshots of a whole stack
==========================

A snapshot is the same name on every dataset of a stack: ``ksnap-<UTC with microseconds>-<random>[-<label>]``. On one
pool all of them are taken in one transaction group, so they are of one moment, as if the power had been cut then.
Several pools are taken one after the other. Who, why, and which job of Salt, are in its user properties ``ksnap:*``.
"""

import contextlib
import datetime
import getpass
import os
import re
import secrets
import signal
import subprocess

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

NAME = re.compile(r"ksnap-(\d{8}T\d{6}\.\d{6}Z)-([0-9a-f]{8})(?:-([A-Za-z0-9_.:-]+))?")
LABEL = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
TAG = re.compile(r"[A-Za-z0-9_.:][A-Za-z0-9_.: -]{0,127}")
LONGEST = 255


def __virtual__():
    return __virtualname__


def new_name(label=None):
    """
    Make a name for a snapshot: ``ksnap-<UTC with microseconds>-<8 random hex digits>[-<label>]``. Names sort by time.

    label
        (string) Letters, digits, and ``_.:-``, 64 at most. Default: none

    Raises ``SaltInvocationError`` for another label.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.new_name before-upgrade
    """
    if label is not None and not (isinstance(label, str) and LABEL.fullmatch(label)):
        raise SaltInvocationError(f"A label is of letters, digits, and _.:-, 64 at most, not {label!r}")
    now = datetime.datetime.now(datetime.UTC)
    name = f"ksnap-{now:%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"
    return f"{name}-{label}" if label else name


def parse_name(name):
    """
    Take the name of a snapshot apart.

    name
        (string) The part after the @.

    Returns a dict: ``time`` (seconds since 1970, a float), ``random`` and ``label`` (``None`` if it has none); ``None``
    for a name that :func:`new_name` did not make.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.parse_name ksnap-20261125T224408.123456Z-0a1b2c3d-before-upgrade
    """
    found = NAME.fullmatch(name)
    if not found:
        return None
    try:
        when = datetime.datetime.strptime(found[1], "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=datetime.UTC)
    except ValueError:
        return None
    return {"time": when.timestamp(), "random": found[2], "label": found[3]}


def snapshot(stack, label=None, reason=None, hold=None, before=None, after=None, timeout=None, test=False, **kwargs):
    """
    Take a snapshot of all datasets of a stack.

    stack
        (string or dict) The stack, see ``ksnap.stack``.
    label
        (string) What to know it by, a part of its name: letters, digits, and ``_.:-``, 64 at most. Default: none
    reason
        (string) Why, for those who read the list. Default: none
    hold
        (string) A tag to hold it with (zfs-hold(8)), so that nothing can destroy it. Default: none
    before
        (list of strings) A command to run first, such as one that quiesces a database. Default: the stack's
    after
        (list of strings) A command to run afterwards, in any case once ``before`` was started. Default: the stack's
    timeout
        (number, seconds) How long each of the two may take. Default: the stack's, 60
    test
        (bool) Only say of what it would be taken. Default: False

    Returns a dict: ``snapshot`` (its name, the part after the @), ``stack``, ``datasets`` (each to its snapshot's
    guid) and ``createtxg`` (each pool to the transaction group).

    Raises ``SaltInvocationError`` for a wrong label or tag, ``CommandExecutionError`` when a command or the snapshot
    failed. There is then no snapshot.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.snapshot mail label=before-upgrade reason='postfix 3.9'
    """
    name = new_name(label)
    if hold is not None:
        _refuse_tag(hold)
    with __salt__["ksnap.locked"](test=test):
        found = __salt__["ksnap.stack"](stack)
        if not found["datasets"]:
            raise CommandExecutionError(
                "There is nothing to take a snapshot of: no part of the stack is on ZFS"
                + (f" ({', '.join(found['outside'])})." if found["outside"] else ".")
            )
        long = [dataset for dataset in found["datasets"] if len(dataset) + 1 + len(name) > LONGEST]
        if long:
            raise CommandExecutionError(f"{long[0]}@{name} is longer than {LONGEST} bytes. Take a shorter label.")
        if test:
            return {"snapshot": name, "stack": found["name"], "datasets": found["datasets"], "createtxg": {}}
        properties = {
            "ksnap:stack": found["name"] or "-",
            "ksnap:count": str(len(found["datasets"])),
            "ksnap:label": label,
            "ksnap:reason": _line(reason),
            "ksnap:who": kwargs.get("__pub_user") or os.environ.get("SUDO_USER") or getpass.getuser(),
            "ksnap:jid": kwargs.get("__pub_jid") or kwargs.get("jid"),
        }
        words = [f"{key}={value}" for key, value in properties.items() if value]
        limit = found["timeout"] if timeout is None else timeout
        before, after = before or found["before"], after or found["after"]
        try:
            if before:
                _hook("before", before, limit)
            taken = _take(found["pools"], name, words)
        except BaseException as error:
            # A database that was quiesced, or half so, must go on whatever happened.
            if after:
                try:
                    _hook("after", after, limit)
                except CommandExecutionError as second:
                    raise CommandExecutionError(f"{error}\n{second}") from error
            raise
        try:
            if after:
                _hook("after", after, limit)
            if hold:
                for datasets in found["pools"].values():
                    _zfs("hold", hold, *(f"{dataset}@{name}" for dataset in datasets))
        except BaseException as error:
            _take_back(found["datasets"], name, error)
            raise
        return {"snapshot": name, "stack": found["name"], **taken}


def _take(pools, name, properties):
    guids, groups, done = {}, {}, []
    options = [word for each in properties for word in ("-o", each)]
    try:
        for pool, datasets in sorted(pools.items()):
            snapshots = [f"{dataset}@{name}" for dataset in datasets]
            _zfs("snapshot", *options, *snapshots)
            done += datasets
            shown = _zfs("list", "-H", "-p", "-t", "snapshot", "-o", "name,guid,createtxg", *snapshots)
            rows = [line.split("\t") for line in shown.splitlines()]
            guids.update({snapshot.split("@")[0]: int(guid) for snapshot, guid, _ in rows})
            made = {int(group) for _, _, group in rows}
            if len(made) != 1 or len(rows) != len(datasets):
                raise CommandExecutionError(
                    f"The snapshots {name} of {pool} were not taken in one transaction group, but in {sorted(made)}."
                )
            groups[pool] = made.pop()
    except BaseException as error:
        _take_back(done, name, error)
        raise
    return {"datasets": guids, "createtxg": groups}


def _take_back(datasets, name, error):
    left = []
    for dataset in datasets:
        try:
            _zfs("destroy", f"{dataset}@{name}")
        except CommandExecutionError:
            left.append(f"{dataset}@{name}")
    if left:
        raise CommandExecutionError(f"{error}\nIt left {', '.join(left)}: destroy that (zfs destroy).") from error


def _hook(when, argv, timeout):
    words = " ".join(argv)
    try:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise CommandExecutionError(
            f"The command {when} the snapshot, {words}, cannot be run: {error.strerror}"
        ) from error
    try:
        said, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise CommandExecutionError(
            f"The command {when} the snapshot, {words}, has not ended within {timeout} s and was killed. No snapshot "
            "was kept. Give it more time (timeout), or see what it waits for."
        ) from error
    if process.returncode:
        raise CommandExecutionError(
            f"The command {when} the snapshot, {words}, failed ({process.returncode}): {said.strip()[-500:]}\n"
            "No snapshot was kept."
        )


def hold(stack, snapshot, tag="ksnap"):
    """
    Hold a snapshot, so that nothing can destroy it until it is released (zfs-hold(8)).

    stack
        (string or dict) The stack.
    snapshot
        (string) The snapshot's name, or its label if it is the only one of it.
    tag
        (string) Who holds it. Default: ksnap

    Returns a sorted list of the datasets whose snapshot was not held with this tag before.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.hold mail before-upgrade tag=audit
    """
    _refuse_tag(tag)
    with __salt__["ksnap.locked"]():
        found = __salt__["ksnap.find"](stack, snapshot)
        fresh = [dataset for dataset, each in found["datasets"].items() if tag not in each["holds"]]
        for names in _by_pool(fresh):
            _zfs("hold", tag, *(f"{dataset}@{found['snapshot']}" for dataset in names))
        return sorted(fresh)


def release(stack, snapshot, tag="ksnap"):
    """
    Take back a hold on a snapshot.

    stack
        (string or dict) The stack.
    snapshot
        (string) The snapshot's name, or its label if it is the only one of it.
    tag
        (string) The tag that it was held with. Default: ksnap

    Returns a sorted list of the datasets whose snapshot was held with it.

    Raises ``SaltInvocationError`` for tags of replication (``zfs_dr:``), which zfs_dr takes back itself.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.release mail before-upgrade tag=audit
    """
    if tag.startswith("zfs_dr:"):
        raise SaltInvocationError(
            f"{tag} is a hold of replication, which needs this snapshot for its next run. zfs_dr.forget gives a target "
            "up."
        )
    _refuse_tag(tag)
    with __salt__["ksnap.locked"]():
        found = __salt__["ksnap.find"](stack, snapshot)
        held = [dataset for dataset, each in found["datasets"].items() if tag in each["holds"]]
        for names in _by_pool(held):
            _zfs("release", tag, *(f"{dataset}@{found['snapshot']}" for dataset in names))
        return sorted(held)


def destroy(stack, snapshot, test=False):
    """
    Destroy a snapshot on all datasets of a stack. This is for good.

    stack
        (string or dict) The stack.
    snapshot
        (string) The snapshot's name, or its label if it is the only one of it.
    test
        (bool) Only say whether it could be destroyed. Default: False

    Returns a dict: ``snapshot``, ``datasets`` (a sorted list).

    Raises ``CommandExecutionError`` when it is held, when a clone was made from it, or when replication needs it,
    with what it is; nothing is then destroyed.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.destroy mail before-upgrade
    """
    with __salt__["ksnap.locked"](test=test):
        found = __salt__["ksnap.find"](stack, snapshot)
        kept = __salt__["ksnap.kept_by"](found)
        if kept:
            raise CommandExecutionError(f"{found['snapshot']} was not destroyed: it is {'; '.join(kept)}")
        done = []
        for dataset in [] if test else sorted(found["datasets"]):
            try:
                _zfs("destroy", f"{dataset}@{found['snapshot']}")
            except CommandExecutionError as error:
                gone = f" It is gone from {', '.join(done)}." if done else ""
                raise CommandExecutionError(f"{error}{gone}") from error
            done.append(dataset)
        return {"snapshot": found["snapshot"], "datasets": sorted(found["datasets"])}


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _line(text):
    return re.sub(r"\s+", " ", str(text)).strip()[:1000] if text else None


def _refuse_tag(tag):
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        raise SaltInvocationError(
            f"A tag to hold with is of letters, digits, spaces, and _.:-, 128 at most, not {tag!r}"
        )


def _by_pool(datasets):
    pools = {}
    for dataset in sorted(datasets):
        pools.setdefault(dataset.split("/")[0], []).append(dataset)
    return pools.values()
