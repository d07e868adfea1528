"""
What has changed since the last replication, found out cheaply
==============================================================

ZFS opens a replica, which is not mounted, anew for each of its snapshots that it is to list: with years of them that
takes longer than to send what is new. So, where the last replication came to its end, the target is asked only what is
needed to see that it is as it was then: first the base alone, whose sums hold all that is below it, then each replica,
but none of its snapshots.
"""

import hashlib
import json

__virtualname__ = "zfs_dr"


def __virtual__():
    return __virtualname__


def digest(stack, guids):
    """
    Tell what marks a set as whole at the target: a checksum over what is in it.

    stack
        (string) The stack's name.
    guids
        (dict) Name of the replica to the guid of its snapshot.

    Returns text of 32 hex digits.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.digest web '{tank:web: 1234}'
    """
    members = sorted([replica, str(guid)] for replica, guid in guids.items())
    return hashlib.sha256(json.dumps([stack, members]).encode()).hexdigest()[:32]


def nothing_new(sides, base, datasets, guids, last):
    """
    Tell whether nothing has changed since the last replication, on either side, without a look at each replica.

    sides
        (dict) As :func:`zfs_dr_side.connect` returns it.
    base
        (string) The dataset at the target that the replicas are children of.
    datasets
        (list of strings) The source's datasets.
    guids
        (dict) Each of them to its guid; empty where they are not known yet.
    last
        (dict) What was noted then: ``snapshot`` (the set), ``guids`` and ``state`` (as :func:`zfs_dr_side.state`
        returned it).

    Returns True where the source has the same datasets and no newer set, that one is whole and held at the target, and
    nothing below the base was written or promoted since, nor a replica destroyed. What somebody renamed there, gave
    other properties, or destroyed of a replica's snapshots, is not seen: a replication that has something to send looks
    at all of it.

    Raises ``CommandExecutionError`` when a dataset does not exist.

    CLI Example: none; :func:`zfs_dr.replicate` begins with it.
    """
    snapshot = last["snapshot"]
    newest, guids, state = __salt__["zfs_dr.glance"](sides, datasets, guids, base, snapshot)
    return newest == snapshot and state is not None and (state, guids) == (last.get("state"), last.get("guids"))


def since(sides, base, stack, names, snapshot):
    """
    Tell what there is at the source since a set became whole at the target, and whether the target is still as then.

    sides
        (dict) As :func:`zfs_dr_side.connect` returns it.
    base
        (string) The dataset at the target that the replicas are children of.
    stack
        (string) The stack's name.
    names
        (dict) Dataset to the name of its replica.
    snapshot
        (string) The set that was replicated last.

    Returns a list of two: what :func:`zfs_dr_side.source_listing` returns, and what
    :func:`zfs_dr_side.target_listing` returns, but of the replicas' snapshots only that of the set. In place of the
    second there is ``None``, and one has to look closer, unless the set is whole at the target, and no replica was
    written to or promoted since, or is half way to another set.

    Raises ``CommandExecutionError`` when a dataset or the base does not exist.

    CLI Example: none; :func:`zfs_dr.replicate` asks it where :func:`nothing_new` is not so.
    """
    source, there = __salt__["zfs_dr.listings"](sides, list(names), base, since=snapshot)
    guids = {
        names[dataset]: next((each["guid"] for each in entry["snapshots"] if each["name"] == snapshot), None)
        for dataset, entry in source.items()
    }
    mark = next((each for each in there["sets"] if each["name"] == snapshot and each["held"]), None)
    replicas = there["replicas"]
    half = any(__salt__["zfs_dr.beside"](name)[1] in ("new", "coming") for name in replicas)
    if not mark or mark["digest"] != digest(stack, guids) or half:
        return [source, None]
    for name, guid in guids.items():
        entry = replicas.get(name)
        if not entry or entry["since"] != 0 or entry["token"] or entry["promoted"]:
            return [source, None]
        # A snapshot that somebody took meanwhile has nothing in it, and is not in the way of the next stream.
        entry["snapshots"] = [{**mark, "guid": guid, "written": 0, "referenced": 0}]
    return [source, there]


def as_received(side, base, names, snapshot):
    """
    Tell whether replicas are as they were received.

    side
        (dict or None) The target's side, as :func:`zfs_dr_side.connect` returns it.
    base
        (string) The dataset at the target that the replicas are children of.
    names
        (iterable of strings) The replicas.
    snapshot
        (string) The name of the set that was received.

    Returns True where all of them have that set and nothing was written to any of them since.

    Raises ``CommandExecutionError`` when the base does not exist.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.as_received null backup/web1 '[tank:web]' ksnap-20261125T222408.123456Z-0a1b2c3d
    """
    replicas = __salt__["zfs_dr.target_listing"](side, base, snapshot)["replicas"]
    return all(name in replicas and replicas[name]["since"] == 0 for name in names)
