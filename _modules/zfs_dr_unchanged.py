"""
Nothing to be done, and found out cheaply
=========================================

Most replications of a stack that seldom changes find nothing new. To see that, much less is asked of ZFS than to choose
what is sent: of the source only the names and guids of snapshots, of the target no snapshot but one.
"""

import hashlib
import json

__virtualname__ = "zfs_dr"

TARGET = ["name", "userrefs", "receive_resume_token", "zfs_dr:digest", "zfs_dr:promoted"]


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


def unchanged(sides, base, stack, names, snapshot):
    """
    Tell whether a set is the newest that all datasets have, is whole at the target, and no replica was touched since.

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

    Returns True, or False where one has to look closer.

    Raises ``CommandExecutionError`` when a dataset or the base does not exist.

    CLI Example: none; :func:`zfs_dr.replicate` begins with it.
    """
    argv = ["zfs", "list", "-Hp", "-d", "1", "-t", "snapshot", "-o", "name,guid,createtxg", *names]
    source = {name: {"snapshots": []} for name in names}
    for line in __salt__["zfs_dr.run"](sides["source"], argv).splitlines():
        name, guid, group = line.split("\t")
        dataset, _, mark = name.partition("@")
        if dataset in source:
            source[dataset]["snapshots"].append({"name": mark, "guid": int(guid), "createtxg": int(group)})
    if __salt__["zfs_dr.newest_set"](source) != snapshot:
        return False
    guids = {
        names[dataset]: next(each["guid"] for each in entry["snapshots"] if each["name"] == snapshot)
        for dataset, entry in source.items()
    }
    columns = ",".join([*TARGET, f"written@{snapshot}"])
    argv = ["zfs", "list", "-Hp", "-d", "1", "-t", "filesystem,volume,snapshot", "-o", columns, base]
    rows = {}
    for line in __salt__["zfs_dr.run"](sides["target"], argv).splitlines():
        name, *values = line.split("\t")
        rows[name] = values
    held, _, mark, *_ = rows.get(f"{base}@{snapshot}", ["0", "-", None])
    if held == "0" or mark != digest(stack, guids) or any(".new-" in name for name in rows):
        return False
    # No transfer that broke off, not promoted, and nothing written since the set, which it must have for that.
    return all(rows.get(f"{base}/{name}", [])[1:] == ["-", "-", "-", "0"] for name in guids)
