"""
What snapshots a stack has, and what keeps them
===============================================
"""

import time

from salt.exceptions import SaltInvocationError

__virtualname__ = "ksnap"

__func_alias__ = {"list_": "list"}

COLUMNS = (
    "name guid createtxg creation used referenced userrefs clones "
    "ksnap:stack ksnap:count ksnap:label ksnap:reason ksnap:who ksnap:jid zfs_dr:needed"
).split()
BATCH = 500  # names on one command line


def __virtual__():
    return __virtualname__


def list_(stack, all=False):
    """
    List the snapshots of a stack, the oldest first.

    stack
        (string or dict) The stack, see ``ksnap.stack``.
    all
        (bool) Also snapshots that ``ksnap.snapshot`` did not make. Default: False

    Returns a list of dicts: ``snapshot`` (the name), ``created`` (seconds since 1970), ``stack``, ``label``,
    ``reason``, ``who``, ``jid`` (each ``None`` if it has none), ``own`` (bool: made by ``ksnap.snapshot``), ``whole``
    (bool: it is on as many datasets as it was taken of), ``used`` (bytes that it alone holds) and ``datasets``: each to
    a dict of ``guid``, ``createtxg``, ``used``, ``referenced`` (bytes), ``holds`` (tags), ``clones`` and ``needed`` (by
    replication: what it says, or ``None``).

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.list mail
    """
    datasets = __salt__["ksnap.stack"](stack)["datasets"]
    return _listed(datasets, all)


def _listed(datasets, all):
    if not datasets:
        return []
    shown = _zfs("list", "-H", "-p", "-d", "1", "-t", "snapshot", "-o", ",".join(COLUMNS), *datasets)
    sets, held = {}, []
    for line in shown.splitlines():
        row = dict(zip(COLUMNS, line.split("\t"), strict=True))
        dataset, _, name = row["name"].partition("@")
        own = bool(__salt__["ksnap.parse_name"](name)) and row["ksnap:count"] != "-"
        if not own and not all:
            continue
        each = sets.setdefault(
            name,
            {
                "snapshot": name,
                "created": int(row["creation"]),
                **{key: _given(row[f"ksnap:{key}"]) for key in ("stack", "label", "reason", "who", "jid")},
                "own": own,
                "count": row["ksnap:count"],
                "used": 0,
                "datasets": {},
            },
        )
        each["created"] = min(each["created"], int(row["creation"]))
        each["used"] += int(row["used"])
        each["own"] = each["own"] and own
        each["datasets"][dataset] = {
            **{key: int(row[key]) for key in ("guid", "createtxg", "used", "referenced")},
            "holds": [],
            "clones": row["clones"].split(",") if row["clones"] not in ("", "-") else [],
            "needed": _given(row["zfs_dr:needed"]),
        }
        if row["userrefs"] not in ("0", "-"):
            held.append(row["name"])
    for start in range(0, len(held), BATCH):
        for line in _zfs("holds", "-H", *held[start : start + BATCH]).splitlines():
            full, tag, *_ = line.split("\t")
            dataset, _, name = full.partition("@")
            sets[name]["datasets"][dataset]["holds"].append(tag)
    for each in sets.values():
        count = each.pop("count")
        each["whole"] = not each["own"] or str(len(each["datasets"])) == count
    # By the transaction groups of the pool; a clock that was wrong changes nothing in it.
    pool = datasets[0].split("/")[0]

    def age(each):
        groups = [has["createtxg"] for name, has in each["datasets"].items() if name.split("/")[0] == pool]
        return (min(groups, default=0), each["created"], each["snapshot"])

    return sorted(sets.values(), key=age)


def find(stack, snapshot):
    """
    Find one snapshot of a stack.

    stack
        (string or dict) The stack.
    snapshot
        (string) Its name, or its label if it is the only one of it. A stack with a name has only labels of its own.

    Returns a dict as ``ksnap.list`` does. Raises ``SaltInvocationError`` when there is none, or more than one.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.find mail before-upgrade
    """
    if not isinstance(snapshot, str) or not snapshot:
        raise SaltInvocationError(f"A snapshot is a name, the part after the @, or a label, not {snapshot!r}")
    stack = __salt__["ksnap.stack"](stack)
    found = list_(stack, all=True)
    named = [each for each in found if each["snapshot"] == snapshot]
    of_all = [each for each in found if each["own"] and each["label"] == snapshot]
    # Two stacks may share a dataset; what the other one calls so is of its own. One without a name is just datasets.
    labelled = [each for each in of_all if stack["name"] in (None, each["stack"])]
    if named or len(labelled) == 1:
        return (named or labelled)[0]
    if labelled:
        raise SaltInvocationError(
            f"{len(labelled)} snapshots have the label {snapshot}; name one of them: "
            + ", ".join(each["snapshot"] for each in labelled)
        )
    if of_all:
        raise SaltInvocationError(
            f"The stack has no snapshot {snapshot} of its own; on its datasets there are, of other stacks: "
            + ", ".join(f"{each['snapshot']} ({each['stack']})" for each in of_all)
        )
    raise SaltInvocationError(f"The stack has no snapshot {snapshot}; see ksnap.list.")


def snapshot_name(stack, snapshot):
    """
    Return the name of a snapshot, from it or from its label. Returns and raises as :func:`find`, the name only.

    stack
        (string or dict) The stack.
    snapshot
        (string) Its name, or its label if it is the only one of it.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.snapshot_name mail before-upgrade
    """
    return find(stack, snapshot)["snapshot"]


def kept_by(snapshot):
    """
    Tell what keeps a snapshot from being destroyed.

    snapshot
        (dict) A snapshot, as ``ksnap.list`` gives it.

    Returns a list of texts, empty if nothing does.

    CLI Example: none; it is called by the functions that destroy.
    """
    reasons = []
    for dataset, has in snapshot["datasets"].items():
        name = f"{dataset}@{snapshot['snapshot']}"
        mine = [tag for tag in has["holds"] if not tag.startswith("zfs_dr:")]
        if mine:
            reasons.append(f"held by {', '.join(mine)} ({name}; ksnap.release)")
        replication = [tag.removeprefix("zfs_dr:") for tag in has["holds"] if tag.startswith("zfs_dr:")]
        replication += [has["needed"]] if has["needed"] else []
        if replication:
            reasons.append(f"needed by replication to {', '.join(replication)} ({name}; zfs_dr.status)")
        if has["clones"]:
            reasons.append(f"the origin of {', '.join(has['clones'])} ({name}; ksnap.clones, ksnap.aside)")
    return reasons


def table(stack, all=False):
    """
    Return the snapshots of a stack as a table for people: when, label, why, the space that each alone holds, and
    what holds it. See also :func:`list`.

    stack
        (string or dict) The stack.
    all
        (bool) Also snapshots that ``ksnap.snapshot`` did not make. Default: False

    CLI Example:

    .. code-block:: bash

        salt-call --out=newline_values_only ksnap.table mail
    """
    rows = [("WHEN (UTC)", "LABEL", "USED", "WHY", "KEPT BY")]
    for each in list_(stack, all):
        tags = sorted({tag for has in each["datasets"].values() for tag in has["holds"]})
        clones = sorted({clone for has in each["datasets"].values() for clone in has["clones"]})
        rows.append(
            (
                time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each["created"])),
                each["label"] or ("-" if each["own"] else each["snapshot"]),
                _readable(each["used"]),
                (each["reason"] or "-") + ("" if each["whole"] else " (not whole)"),
                ", ".join([*tags, *clones]) or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _readable(size):
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return None


def _given(value):
    return None if value in ("-", "") else value


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])
