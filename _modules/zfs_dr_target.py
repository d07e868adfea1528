"""
What is at a target: whole sets, what was set aside; pruning it and giving it up
================================================================================
"""

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

PART = 100


def __virtual__():
    return __virtualname__


def _here(base):
    return __salt__["zfs_dr.target_listing"](None, base)


def _is_aside(name):
    return __salt__["zfs_dr.beside"](name)[1] == "aside"


def sets(base, stack=None, there=None):
    """
    List the sets that are whole in a base on this machine.

    base
        (string) The dataset that the replicas are children of.
    stack
        (string) Only those of this stack. Default: of all.
    there
        (dict) What :func:`zfs_dr_side.target_listing` returned. Default: it is asked.

    Returns a list of dicts, oldest first: ``snapshot``, ``stack``, ``source`` (the machine), ``members`` (how many
    datasets), ``taken`` (seconds since the epoch, by the source's clock), ``arrived`` (by this one's) and ``whole``
    (bool: False where datasets of it were destroyed since).

    Raises ``CommandExecutionError`` when there is no such dataset.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.sets backup/web1
    """
    there = there or _here(base)
    told = []
    for mark in there["sets"]:
        if mark["stack"] is None or stack not in (None, mark["stack"]):
            continue
        inside = [
            s
            for name, entry in there["replicas"].items()
            if entry["stack"] == mark["stack"] and not _is_aside(name)
            for s in entry["snapshots"]
            if s["name"] == mark["name"]
        ]
        told.append(
            {
                "snapshot": mark["name"],
                "stack": mark["stack"],
                "source": mark["source"],
                "members": mark["members"],
                "taken": min((s["creation"] for s in inside), default=mark["creation"]),
                "arrived": mark["creation"],
                "whole": len(inside) >= mark["members"],
            }
        )
    return told


def prune(base, stack, grid=None, count=None, test=False):
    """
    Destroy sets at a target that its grid does not keep. Run it on the target's own machine: a source that may destroy
    its replicas is no safety.

    base
        (string) The dataset that the replicas are children of, on this machine.
    stack
        (string) Whose sets.
    grid
        (string) As :func:`ksnap_prune.grid_parsed` reads it: ``24x1h | 30x1d``. Default: no grid.
    count
        (int) Keep so many of the newest in any case. Default: None.
    test
        (bool) Destroy nothing, only tell. Default: False.

    Returns a dict: ``kept`` and ``destroyed``, each a dict of set to reason; of sets that never became whole, what is
    there of them goes once a newer one is. The newest whole set always stays, and so does what is held or has a clone
    (a rehearsal).

    Raises ``SaltInvocationError`` without a grid and a count, ``CommandExecutionError`` when ZFS refuses.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.prune backup/web1 web '24x1h | 30x1d' test=True
    """
    if grid is None and count is None:
        raise SaltInvocationError("prune needs a grid, such as '24x1h | 30x1d', or a count")
    there = _here(base)
    found = sets(base, stack, there)
    whole = [each for each in found if each["whole"]]
    intervals = __salt__["ksnap.grid_kept"](grid, [each["taken"] for each in found]) if grid else [None] * len(found)
    kept, destroyed = {}, {}
    for rank, (each, interval) in enumerate(zip(found, intervals, strict=True)):
        name = each["snapshot"]
        if whole and each is whole[-1]:
            kept[name] = "the newest whole set: the next replication goes on from it"
        elif count and len(found) - rank <= count:
            kept[name] = f"one of the {count} newest"
        elif interval:
            kept[name] = f"the one for the age of {interval}"
        else:
            destroyed[name] = "not kept by " + " and ".join(filter(None, [grid and "the grid", count and "the count"]))
    for name in _left_over(there, stack, whole):
        destroyed[name] = "it never became whole, and a newer one did"
    replicas = {
        name: [s["name"] for s in entry["snapshots"] if s["name"] in destroyed]
        for name, entry in there["replicas"].items()
        if entry["stack"] == stack and not _is_aside(name)
    }
    marks = [each["snapshot"] for each in found if each["snapshot"] in destroyed]
    doomed = {"": marks, **{f"/{name}": names for name, names in replicas.items()}}
    for name, why in _in_use(base, doomed).items():
        kept[name] = why
        del destroyed[name]
    # The marks go first: what is whole is never a part of what it was.
    for place, names in doomed.items():
        gone = [name for name in names if name in destroyed]
        for part in [] if test else _parts(gone):
            __salt__["ksnap.command"](["zfs", "destroy", f"{base}{place}@{','.join(part)}"])
    return {"kept": kept, "destroyed": destroyed}


def _left_over(there, stack, whole):
    # Sets of which some replicas have their part, and the base no mark: what broke off, and was overtaken.
    marked = {mark["name"] for mark in there["sets"]}
    found = []
    for name, entry in there["replicas"].items():
        names = [s["name"] for s in entry["snapshots"]]
        if whole and entry["stack"] == stack and not _is_aside(name) and whole[-1]["snapshot"] in names:
            older = names[: names.index(whole[-1]["snapshot"])]
            found += [each for each in older if each.startswith("ksnap-") and each not in marked]
    return dict.fromkeys(found)


def _parts(names):
    # The kernel takes no word of more than 128 KiB, nor 2 MiB of them.
    return [names[at : at + PART] for at in range(0, len(names), PART)]


def _in_use(base, doomed):
    # What is held, and what a clone stands on, as a rehearsal or what was set aside does.
    names = [f"{base}{place}@{name}" for place, found in doomed.items() for name in found]
    argv = ["zfs", "list", "-Hp", "-o", "name,userrefs,clones"]
    why = {}
    for line in "".join(__salt__["ksnap.command"]([*argv, *part]) for part in _parts(names)).splitlines():
        name, held, clones = line.split("\t")
        if held not in ("0", "-"):
            why[name.partition("@")[2]] = f"{name} is held"
        elif clones not in ("", "-"):
            why[name.partition("@")[2]] = f"{clones} is a clone of it"
    return why


def asides(base):
    """
    List what was set aside at a target on this machine.

    base
        (string) The dataset that the replicas are children of.

    Returns a list of dicts: ``name``, ``replica`` (of which), ``stack``, ``space`` (bytes that it alone holds) and
    ``snapshots`` (number).

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.asides backup/web1
    """
    there = _here(base)
    names = sorted(name for name in there["replicas"] if _is_aside(name))
    if not names:
        return []
    argv = ["zfs", "list", "-Hp", "-o", "used", *(f"{base}/{name}" for name in names)]
    used = [int(line) for line in __salt__["ksnap.command"](argv).split()]
    return [
        {
            "name": f"{base}/{name}",
            "replica": f"{base}/{name.rpartition('.aside-')[0]}",
            "stack": there["replicas"][name]["stack"],
            "space": size,
            "snapshots": len(there["replicas"][name]["snapshots"]),
        }
        for name, size in zip(names, used, strict=True)
    ]


def discard_aside(name):
    """
    Destroy what was set aside at a target on this machine, for good.

    name
        (string) As :func:`asides` names it.

    Raises ``SaltInvocationError`` for another name, ``CommandExecutionError`` when something still depends on it, and
    while the replica in its place has not arrived whole.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.discard_aside backup/web1/tank:web.aside-20261125T222408Z
    """
    base, _, short = name.rpartition("/")
    if not base or not _is_aside(short):
        raise SaltInvocationError(f"{name} is nothing that was set aside; zfs_dr.asides lists that")
    replica = short.rpartition(".aside-")[0]
    other = _here(base)["replicas"].get(replica)
    if other and (other["token"] or not other["snapshots"]):
        raise CommandExecutionError(
            f"{name} was not destroyed: {base}/{replica}, which is to replace it, has not arrived whole, so this may "
            "be the only copy. Let zfs_dr.replicate come to its end first."
        )
    _release_all(name)
    __salt__["ksnap.command"](["zfs", "destroy", "-r", name])


def _release_all(dataset):
    for snapshot, tag in __salt__["zfs_dr.holds"]([dataset]):
        if tag.startswith("zfs_dr:"):
            __salt__["ksnap.command"](["zfs", "release", tag, snapshot])


def forget(stack, target, test=False):
    """
    Give a target up: nothing at the source is kept for it any more. The replicas stay, and are not held there any more.

    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it; it need not be reachable.
    test
        (bool) Release nothing, only tell. Default: False.

    Returns a dict: ``released`` (snapshots), ``bookmarks`` (destroyed) and ``unreachable`` (why the target's own holds
    are there yet, or ``None``).

    Raises ``CommandExecutionError`` when something could not be released.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.forget web vault
    """
    target = __salt__["zfs_dr.target"](target)
    name, datasets, _ = __salt__["zfs_dr.members"](stack, target)
    told = {"released": [], "bookmarks": [], "unreachable": None}
    try:
        sides = __salt__["zfs_dr.connect"](target)
    except CommandExecutionError as error:
        if target["direction"] == "pull":
            raise
        sides, told["unreachable"] = {"source": None, "target": None}, str(error)
    try:
        source = __salt__["zfs_dr.source_listing"](sides["source"], datasets)
        left = (__salt__["zfs_dr.noted"](target, name).get("guids") or {}).keys() - set(datasets)
        source.update(__salt__["zfs_dr.listed_still"](sides["source"], left))
        told.update(__salt__["zfs_dr.give_up"](sides["source"], target, source, test=test))
        if sides["source"] is None:
            told["released"] += __salt__["zfs_dr.release_asides"](list(source), f"zfs_dr:{target['mark']}", test)
        if test:
            return told
        if told["unreachable"] is None:
            _release_there(sides["target"], target, name, told)
    finally:
        __salt__["zfs_dr.disconnect"](sides)
    __salt__["zfs_dr.note"](target, name, None)
    return told


def _release_there(side, target, stack, told):
    try:
        there = __salt__["zfs_dr.target_listing"](side, target["dataset"])
    except CommandExecutionError as error:
        told["unreachable"] = str(error)
        return
    held = {s["name"] for s in there["sets"] if s["held"] and s["stack"] == stack}
    held |= {
        s["name"]
        for entry in there["replicas"].values()
        if entry["stack"] == stack
        for s in entry["snapshots"]
        if s["held"]
    }
    for snapshot in sorted(held):
        argv = ["zfs", "release", "-r", f"zfs_dr:{stack}", f"{target['dataset']}@{snapshot}"]
        __salt__["zfs_dr.run"](side, argv, code=True)
