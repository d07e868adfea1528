"""
What is to be sent, decided from two listings
=============================================

Nothing here touches ZFS: given what the source has and what the target has, :func:`choose` says what brings the
target up to the source's snapshot set, dataset by dataset.

Snapshots are the same when their guid is; names, creation times and clocks decide nothing. What would have to be
destroyed at the target before it could receive is set aside there instead. A replica that nothing can be added to stays
until the one that replaces it has arrived whole, under another name.
"""

import re

from salt.exceptions import SaltInvocationError

__virtualname__ = "zfs_dr"


def __virtual__():
    return __virtualname__


def beside(name):
    """
    Tell what stands beside a replica, by its name. Pure.

    name
        (string) A dataset's name at the target, without the base: ``<replica>.<kind>-<time>``. ``aside`` is what was
        set aside, ``new`` what is about to take the replica's place, ``coming`` what is received to replace it.

    Returns a list of the replica's name, the kind and the time, as text; of a replica itself the last two are empty.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.beside tank:web.aside-20261125T222408Z
    """
    match = re.fullmatch(r"(.+)\.(aside|new|coming)-(\d{8}T\d{6}Z)", name)
    return list(match.groups()) if match else [name, "", ""]


def newest_set(datasets, prefix="ksnap-"):
    """
    Find the newest snapshot that all datasets have.

    datasets
        (dict) As :func:`zfs_dr_side.listing` returns them: name to ``snapshots``, each a list of dicts with ``name``
        (what is after the @), ``guid`` and ``createtxg``.
    prefix
        (string) What the names of snapshot sets begin with. Default: ``ksnap-``.

    Returns its name, or ``None`` where no snapshot is common to all. The order is that of the transaction groups
    of the first dataset, not that of names or clocks.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.newest_set '{tank/a: {snapshots: [{name: ksnap-1, guid: 1, createtxg: 1}]}}'
    """
    if not datasets:
        return None
    names = [{snapshot["name"] for snapshot in dataset["snapshots"]} for dataset in datasets.values()]
    common = {name for name in set.intersection(*names) if name.startswith(prefix)}
    first = next(iter(datasets.values()))["snapshots"]
    return max(
        (snapshot for snapshot in first if snapshot["name"] in common),
        key=lambda snapshot: snapshot["createtxg"],
        default={"name": None},
    )["name"]


def _by_guid(dataset):
    # A bookmark stands in for its snapshot only when that is gone: a send from a snapshot can do more.
    bookmarks = {mark["guid"]: ("#", mark) for mark in dataset["bookmarks"]}
    return {**bookmarks, **{snapshot["guid"]: ("@", snapshot) for snapshot in dataset["snapshots"]}}


def _matched(datasets, replicas, names):
    # Which replica belongs to which dataset: the one of its name, unless another holds more of its history, as after a
    # rename. A replica is given once.
    known = {name: _by_guid(dataset) for name, dataset in datasets.items()}

    def shared(name, replica):
        entry = replicas[replica]
        history = entry["snapshots"] + (entry["coming"]["snapshots"] if entry.get("coming") else [])
        return [s["createtxg"] for s in history if s["guid"] in known[name]]

    matched, free = {}, set(replicas)
    for name in datasets:
        own = names[name]
        if own in free and shared(name, own):
            matched[name] = own
            free.discard(own)
    for name in datasets.keys() - matched.keys():
        others = [replica for replica in free if shared(name, replica)]
        if others:
            matched[name] = max(others, key=lambda replica: max(shared(name, replica)))
            free.discard(matched[name])
    for name in datasets.keys() - matched.keys():
        if names[name] in free:
            matched[name] = names[name]
            free.discard(names[name])
    return matched


REPLACE = ["replace"]


def _refused(replica, why):
    return {"replica": replica, "place": replica, "acts": [], "why": why, "refused": True}


def _one(name, dataset, wanted, replica, target, full):
    # (acts, why) that bring one replica to the wanted snapshot; or a refusal as a string.
    known = _by_guid(dataset)
    acts = []
    snapshots = target["snapshots"]
    newest = snapshots[-1] if snapshots else None
    token = target.get("token")
    if newest and wanted["guid"] == newest["guid"] and not target["written"] and not token:
        return [], "already there"
    if token:
        kind, to = known.get(token["to"], (None, None))
        base = newest["guid"] if newest else 0
        usable = (
            kind == "@"
            and token["from"] == base
            and not (newest and target["written"])
            and to["createtxg"] <= wanted["createtxg"]
            and (not base or base in known)
        )
        if usable:
            acts.append(["resume", to["name"]])
            if to["guid"] == wanted["guid"]:
                return acts, "resumed"
            return [*acts, ["send", f"{name}@{to['name']}", wanted["name"]]], "resumed, then incremental"
        acts.append(["abort"])
    if not newest:
        # A replica without a snapshot is what is left of a first transfer that broke off: its abort removes it.
        if not token:
            acts.append(["aside", None])
        return [*acts, ["send", None, wanted["name"]]], "full: the first transfer had not come to its end"
    there = [snapshot for snapshot in snapshots if snapshot["guid"] in known]
    if any(snapshot["guid"] == wanted["guid"] for snapshot in there):
        if newest["guid"] != wanted["guid"] or target["written"]:
            return [*acts, ["aside", wanted["name"]]], "the target had gone on by itself: that is set aside"
        return acts, "already there"
    if not there:
        made_anew = target.get("origin_guid") not in (None, dataset["guid"])
        if not (made_anew or full or target.get("coming")):
            return (
                f"{name} and its replica {replica} have no snapshot and no bookmark in common any more, so only a full "
                "send would help. If that is wanted, call again with full=True: the replica is set aside, not lost."
            )
        why = (
            "the dataset is another one than before (made anew, or taken back to before all that the target has)"
            if made_anew
            else "nothing in common, and full=True"
        )
        return [*acts, REPLACE, ["send", None, wanted["name"]]], f"full: {why}; the old replica is set aside"
    common = there[-1]
    kind, base = known[common["guid"]]
    if base["createtxg"] >= wanted["createtxg"]:
        return (
            f"the target has {replica}@{common['name']}, which is newer than {name}@{wanted['name']}. Take a new "
            "snapshot of the stack, then replicate that."
        )
    why = "incremental"
    if common is not newest or target["written"]:
        acts.append(["aside", common["name"]])
        why = "incremental; what the target had beyond that is set aside"
    if kind == "#":
        why += ", from a bookmark"
    return [*acts, ["send", f"{name}{kind}{base['name']}", wanted["name"]]], why


def _with_coming(name, dataset, wanted, replica, target, full):
    # What is received to replace a replica is brought up as one is; where that one can be gone on with, it is given up.
    chosen, coming = _one(name, dataset, wanted, replica, target, full), target.get("coming")
    if isinstance(chosen, str) or not coming:
        return chosen
    acts, why = chosen
    if REPLACE not in acts:
        return [["drop", coming["name"]], *acts], why
    there = _one(name, dataset, wanted, coming["name"], coming, True)
    if isinstance(there, str):
        return there
    acts, gone_on = there
    acts = [["aside", None] if act == REPLACE else act for act in acts]
    return [REPLACE, *acts], f"{why}; to replace it: {gone_on}"


def choose(datasets, replicas, snapshot, names, full=False, stamp=""):
    """
    Decide what brings the replicas of some datasets to one snapshot. Pure: two listings go in, a plan comes out.

    datasets
        (dict) The source's side: name to a dict of ``guid`` (int), ``snapshots`` and ``bookmarks`` (lists of dicts with
        ``name``, ``guid``, ``createtxg``, ordered by the last).
    replicas
        (dict) The target's side: name to a dict of ``snapshots`` (the same), ``written`` (bytes since the newest),
        ``token`` (``None``, or a dict with the guids ``to`` and ``from``, 0 for a full send), ``origin_guid`` (the guid
        of the dataset that it was made from, or ``None``), ``promoted`` (bool) and, where one is being received to
        replace it, ``coming`` (a dict of the same, and its ``name``).
    snapshot
        (string) The name of the set, what is after the @. Every dataset must have it.
    names
        (dict) Dataset to the name that its replica is to have.
    full
        (bool) Whether a full send is allowed where nothing is left in common. Default: False. A dataset that has
        never been there, and one that was made anew under its old name, are sent in full in any case.
    stamp
        (string) The time, with which the name of a replacement ends. Default: none.

    Returns a dict, dataset to ``replica`` (name), ``place`` (the name of what receives: the replica's, or that of what
    is to replace it), ``refused`` (bool), ``why`` (string) and ``acts``, a list to be done in order:

    - ``[rename, old]``: the replica has another name yet
    - ``[drop, name]``: what was to replace the replica is of no use any more
    - ``[replace]``: what follows is done to the place, which takes the replica's name when the set is whole
    - ``[abort]``: throw away a partial transfer that is of no use any more
    - ``[aside, snapshot]``: set aside what the replica has beyond that snapshot, or with ``None`` all of the replica
    - ``[resume, snapshot]``: go on with the partial transfer, which ends at that snapshot
    - ``[send, base, snapshot]``: from ``dataset@name`` or ``dataset#name``, or in full with ``None``

    Raises ``SaltInvocationError`` when a dataset has no such snapshot.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.choose '{}' '{}' ksnap-20261125T222408.123456Z-0a1b2c3d '{}'
    """
    matched = _matched(datasets, replicas, names)
    plan = {}
    for name, dataset in datasets.items():
        wanted = next((s for s in dataset["snapshots"] if s["name"] == snapshot), None)
        if wanted is None:
            raise SaltInvocationError(f"{name} has no snapshot {snapshot}; name a set that all datasets have")
        replica = names[name]
        found = matched.get(name)
        if found is None:
            plan[name] = {
                "replica": replica,
                "place": replica,
                "acts": [["send", None, snapshot]],
                "why": "full: it is not at the target yet",
                "refused": False,
            }
            continue
        target = replicas[found]
        if target["promoted"]:
            plan[name] = _refused(
                replica,
                f"{found} was promoted: it serves, and may be the only copy of what was written since. Bring that back "
                "first: zfs_dr.demote there, then zfs_dr.failback here.",
            )
            continue
        chosen = _with_coming(name, dataset, wanted, found, target, full)
        if isinstance(chosen, str):
            plan[name] = _refused(found, chosen)
            continue
        acts, why = chosen
        if found != replica:
            acts = [["rename", found], *acts]
            why += f"; {found} was renamed, as its dataset was"
        place = _coming_name(replica, target.get("coming"), stamp) if REPLACE in acts else replica
        plan[name] = {"replica": replica, "place": place, "acts": acts, "why": why, "refused": False}
    _make_room(plan, replicas)
    return plan


def _coming_name(replica, coming, stamp):
    return f"{replica}.coming-{beside(coming['name'])[2] if coming else stamp}"


def _make_room(plan, replicas):
    # A replica may stand under the name that another one is to have: of a dataset that is not in the set any more.
    moved = {step["acts"][0][1] for step in plan.values() if step["acts"] and step["acts"][0][0] == "rename"}
    for step in plan.values():
        name = step["replica"]
        if not step["acts"] or step["acts"][0][0] != "rename" or name not in replicas or name in moved:
            continue
        if replicas[name]["promoted"]:
            old = step["acts"][0][1]
            step.update(_refused(name, f"{name} was promoted, and stands where {old} is to be renamed to"))
        else:
            step["acts"].insert(0, ["aside", None])
