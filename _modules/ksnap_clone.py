"""
A writable copy of a whole stack
================================

Clones of all datasets of a stack, mounted under one root as the originals are under ``/``: never over an original, and
never at the machine's start (``canmount=noauto``). A clone lies beside its original, ``<dataset>.clone-<id>``, where it
inherits the same properties and the same encryption key.
"""

import datetime
import getpass
import json
import os
import re
import secrets

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

RECORD = "ksnap:clone"
NAME = re.compile(r"(.*)[./]clone-((\d{8}T\d{6}Z)-[0-9a-f]{4})(/.*)?")
LONGEST = 255
# What a clone has from its origin, what is one dataset's own, and what would let it do harm.
NOT_COPIED = set(
    "canmount casesensitivity encryption keyformat keylocation mountpoint normalization pbkdf2iters pbkdf2salt quota "
    "refquota refreservation reservation sharenfs sharesmb utf8only version volblocksize volsize".split()
)


def __virtual__():
    return __virtualname__


def clone(stack, snapshot, root, test=False):
    """
    Make a writable copy of all datasets of a stack, and mount it under a root.

    stack
        (string or dict) The stack, see ``ksnap.stack``.
    snapshot
        (string) Of which of its snapshots: the name, or the label if it is the only one of it.
    root
        (string) The directory under which the copy is mounted, absolute; made if it is not there, else it must be
        empty. A dataset mounted at ``/srv/mail`` is mounted at ``<root>/srv/mail``.
    test
        (bool) Only say what would be made. Default: False

    Returns a dict as :func:`clones` lists it.

    Raises ``SaltInvocationError`` for a root that will not do, ``CommandExecutionError`` when a clone cannot be made or
    mounted; nothing of it is then left.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.clone mail before-upgrade /mnt/mail-before
    """
    _refuse_root(root)
    with __salt__["ksnap.locked"](test=test):
        found = __salt__["ksnap.find"](stack, snapshot)
        name, datasets = found["snapshot"], sorted(found["datasets"])
        missing = sorted(set(__salt__["ksnap.stack"](stack)["datasets"]) - set(datasets))
        if missing:
            raise CommandExecutionError(
                f"There is no snapshot {name} of {', '.join(missing)}. Take these datasets out of the stack."
            )
        identifier = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        targets = {dataset: _target(dataset, datasets, identifier) for dataset in datasets}
        long = [target for target in targets.values() if len(target) > LONGEST]
        if long:
            raise CommandExecutionError(f"{long[0]} is longer than {LONGEST} bytes: rename the original.")
        properties = _properties(datasets)
        _refuse_locked(properties)
        record = {
            "id": identifier,
            "stack": __salt__["ksnap.stack"](stack)["name"],
            "snapshot": name,
            "root": root,
            "when": int(datetime.datetime.now(datetime.UTC).timestamp()),
            "who": os.environ.get("SUDO_USER") or getpass.getuser(),
            "count": len(datasets),
        }
        places = {dataset: _place(dataset, properties[dataset], root) for dataset in datasets}
        if test:
            return {**_without_count(record), "datasets": targets, "mounts": _told(places), "whole": True}
        made = []
        try:
            for dataset in datasets:
                options = _options(properties[dataset], places[dataset])
                options.append(f"{RECORD}={json.dumps({**record, 'of': dataset})}")
                words = [word for option in options for word in ("-o", option)]
                _zfs("clone", *words, f"{dataset}@{name}", targets[dataset])
                made.append(targets[dataset])
            for dataset in sorted(filter(places.get, datasets), key=places.get):
                _zfs("mount", targets[dataset])
        except CommandExecutionError as error:
            _take_back(made, error)
            raise
        return {**_without_count(record), "datasets": targets, "mounts": _told(places), "whole": True}


def clones(stack=None):
    """
    List the copies that :func:`clone` made, the oldest first.

    stack
        (string) Only those of the stack of this name. Default: all

    Returns a list of dicts: ``id``, ``stack``, ``snapshot``, ``root``, ``when`` (seconds since 1970), ``who``,
    ``datasets`` (each to its clone), ``mounts`` (each to where it is mounted now, or ``None``) and ``whole`` (False if
    some of its clones are gone, or were never made, or have nothing of their own yet, since the power was cut just
    then; where that is so of all, ``stack``, ``root`` and ``who`` are ``None``).

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.clones
    """
    shown = _zfs("get", "-H", "-p", "-t", "filesystem,volume", "-o", "name,property,value,source", f"origin,{RECORD}")
    mounted = {mount["source"]: mount["path"] for mount in __salt__["ksnap.mounts"]() if mount["type"] == "zfs"}
    has, sets = {}, {}
    for line in shown.splitlines():
        name, key, value, source = line.split("\t")
        if key == "origin" or source == "local":
            has.setdefault(name, {})[key] = value
    for name, values in has.items():
        record = json.loads(values[RECORD]) if RECORD in values else _nameless(name, values["origin"])
        if record:
            of, count = record.pop("of"), record.pop("count")
            each = sets.setdefault(record["id"], {**record, "datasets": {}, "mounts": {}, "whole": True})
            # What the record says goes before what the name tells.
            each.update({key: value for key, value in record.items() if value is not None})
            each["datasets"][of] = name
            each["mounts"][of] = mounted.get(name)
            each["count"], each["named"] = max(count, each.get("count", 0)), each.get("named", 0) + bool(count)
    for each in sets.values():
        each["whole"] = each.pop("named") == each.pop("count") > 0
    found = [each for each in sets.values() if stack is None or each["stack"] == stack]
    return sorted(found, key=lambda each: (each["when"], each["id"]))


def _nameless(name, origin):
    # OpenZFS makes a clone in one transaction group and sets its properties in the next: a power cut comes between.
    match, (of, _, snapshot) = NAME.fullmatch(name), origin.partition("@")
    if not match or of != match[1] + (match[4] or ""):
        return None
    when = datetime.datetime.strptime(match[3], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
    told = {"id": match[2], "stack": None, "snapshot": snapshot, "root": None, "when": int(when.timestamp())}
    return {**told, "who": None, "of": of, "count": 0}


def promote(identifier):
    """
    Make a copy independent of its originals: it then owns the snapshots up to the one it was made from, and the
    originals are clones of it. ``ksnap.clones`` lists it no more.

    identifier
        (string) Its id, as ``ksnap.clones`` lists it.

    Returns a dict of each original to its former clone. Raises ``SaltInvocationError`` for an unknown id,
    ``CommandExecutionError`` when it failed; the message says which are promoted.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.promote 20261125T224208Z-5f0e
    """
    with __salt__["ksnap.locked"]():
        wanted = _one(identifier)
        done = []
        for name in sorted(wanted["datasets"].values()):
            try:
                # Called again after a failure, or a power cut, it goes on.
                origin = _zfs("get", "-H", "-o", "value", "origin", name).strip()
                if origin != "-":
                    __salt__["ksnap.promote_dataset"](name, origin)
            except CommandExecutionError as error:
                raise CommandExecutionError(
                    f"{error}\nPromoted already: {', '.join(done) or 'none'}. Call it again to go on."
                ) from error
            done.append(name)
        for name in done:
            _zfs("inherit", RECORD, name)
        return wanted["datasets"]


def discard(identifier, test=False):
    """
    Unmount and destroy a copy that :func:`clone` made, with what was changed in it. This is for good.

    identifier
        (string) Its id, as ``ksnap.clones`` lists it.
    test
        (bool) Only say what would be destroyed. Default: False

    Returns a dict: ``id``, ``datasets`` (a sorted list of those destroyed).

    Raises ``SaltInvocationError`` for an unknown id, ``CommandExecutionError`` when it is in use, or snapshots were
    taken of it, or something was put below it; the message says what. Nothing is then destroyed.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.discard 20261125T224208Z-5f0e
    """
    with __salt__["ksnap.locked"](test=test):
        wanted = _one(identifier)
        names = sorted(wanted["datasets"].values())
        below = set(_zfs("list", "-H", "-r", "-t", "all", "-o", "name", *names).split("\n")) - {"", *names}
        if below:
            raise CommandExecutionError(
                f"The copy {identifier} was not destroyed: {', '.join(sorted(below))} was made of it, or below it, "
                "since. "
                "Destroy or move that first."
            )
        mounted = [mount["path"] for mount in __salt__["ksnap.mounts"]() if mount["source"] in names]
        busy = {path: users for path in mounted if (users := __salt__["ksnap.users"](path))}
        if busy:
            told = "; ".join(f"{path} is in use by {', '.join(users)}" for path, users in busy.items())
            raise CommandExecutionError(f"The copy {identifier} was not destroyed: {told}. Stop that first.")
        if not test:
            _unmount(names)
            for name in reversed(names):
                _zfs("destroy", name)
        return {"id": identifier, "datasets": names}


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _one(identifier):
    found = [each for each in clones() if each["id"] == identifier]
    if not found:
        raise SaltInvocationError(f"There is no copy {identifier}; see ksnap.clones.")
    return found[0]


def _without_count(record):
    return {key: value for key, value in record.items() if key != "count"}


def _told(places):
    return {dataset: place if place else None for dataset, place in places.items()}


def _refuse_root(root):
    if not isinstance(root, str) or not root.startswith("/") or os.path.normpath(root) != root or root == "/":
        raise SaltInvocationError(
            f"root must be an absolute path other than /, without a slash at its end, not {root!r}"
        )
    if os.path.realpath(root) != root:
        raise SaltInvocationError(f"root must not lead over symbolic links; {root} is {os.path.realpath(root)}")
    if os.path.exists(root) and (not os.path.isdir(root) or os.listdir(root)):
        raise SaltInvocationError(f"root must be an empty directory, or not be there; {root} has something in it")


def _target(dataset, datasets, identifier):
    top = dataset
    while top.rpartition("/")[0] in datasets:
        top = top.rpartition("/")[0]
    # The root dataset of a pool has nothing beside it.
    beside = f"{top}.clone-{identifier}" if "/" in top else f"{top}/clone-{identifier}"
    return beside + dataset[len(top) :]


def _properties(datasets):
    shown = _zfs("get", "-H", "-p", "-o", "name,property,value,source", "all", *datasets)
    found = {}
    for line in shown.splitlines():
        name, key, value, source = line.split("\t")
        found.setdefault(name, {})[key] = {"value": value, "source": source}
    return found


def _refuse_locked(properties):
    locked = [name for name, has in properties.items() if has.get("keystatus", {}).get("value") == "unavailable"]
    if locked:
        raise CommandExecutionError(f"The encryption keys of {', '.join(locked)} are not loaded (zfs load-key).")


def _place(dataset, has, root):
    """Where a clone is mounted: ``None`` for a volume, an empty text for what is mounted nowhere."""
    if has["type"]["value"] == "volume":
        return None
    mountpoint = has["mountpoint"]["value"]
    if mountpoint == "legacy":
        mounts = [mount["path"] for mount in __salt__["ksnap.mounts"]() if mount["source"] == dataset]
        mountpoint = mounts[0] if mounts else "none"
    if mountpoint == "none" or has["canmount"]["value"] == "off":
        return ""
    return root + mountpoint.rstrip("/") if mountpoint != "/" else root


def _options(has, place):
    found = [
        f"{key}={entry['value']}"
        for key, entry in has.items()
        if entry["source"] in ("local", "received") and key not in NOT_COPIED and not re.match("ksnap:|zfs_dr:", key)
    ]
    if place is None:
        return found
    return [*found, "canmount=noauto" if place else "canmount=off", f"mountpoint={place or 'none'}"]


def _unmount(names):
    done = []
    # The last one first: what is mounted on another need not lie below it by its name.
    for mount in reversed(__salt__["ksnap.mounts"]()):
        if mount["source"] not in names:
            continue
        try:
            _zfs("unmount", mount["source"])
        except CommandExecutionError as error:
            for dataset in reversed(done):
                _zfs("mount", dataset)
            raise CommandExecutionError(f"Nothing was destroyed, and all is mounted as it was: {error}") from error
        done.append(mount["source"])


def _take_back(made, error):
    left = []
    for name in reversed(made):
        try:
            if any(mount["source"] == name for mount in __salt__["ksnap.mounts"]()):
                _zfs("unmount", name)
            _zfs("destroy", name)
        except CommandExecutionError:
            left.append(name)
    if left:
        raise CommandExecutionError(f"{error}\nIt left {', '.join(left)}; see ksnap.clones, ksnap.discard.") from error
