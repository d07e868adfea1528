"""
What a target needs to be kept at the source
============================================

The last whole set is held (tag ``zfs_dr:<target>``) and bookmarked (``#zfs_dr-<target>-<set>``), so that the next
replication finds something to go on from, whatever is pruned. What came before is let go, and so is a dataset that left
the stack.
"""

import os
import re

from salt.exceptions import CommandExecutionError

__virtualname__ = "zfs_dr"

MARKS = 2  # bookmarks of a dataset that stay for a target
# All bookmarks of a set in one transaction group (zfs-program(8)); one that is there already is no error.
BOOKMARK = """
args = ...
for at = 1, #args["argv"], 2 do
    failed = zfs.sync.bookmark(args["argv"][at], args["argv"][at + 1])
    if failed ~= 0 and failed ~= EEXIST then
        error(args["argv"][at + 1] .. ": error " .. failed)
    end
end
"""


def __virtual__():
    return __virtualname__


def _tag(target):
    return f"zfs_dr:{target['mark']}"


def hold(side, target, datasets, snapshot, verb="hold"):
    """
    Hold a set at the source for a target, or release it.

    side
        (dict or None) The source's side, as :func:`zfs_dr_side.connect` returns it.
    target
        (dict) As :func:`zfs_dr_side.target` returns it.
    datasets
        (list of strings) Their names.
    snapshot
        (string) The name of the set, what is after the @.
    verb
        (string) ``hold`` or ``release``. Default: ``hold``. What is so already is no error.

    Raises ``CommandExecutionError`` when ZFS refuses.

    CLI Example: none; :func:`zfs_dr.replicate` begins with it.
    """
    tag, pools = _tag(target), {}
    # Those of one pool by one call, in one transaction group; nothing but this set has such a name.
    for dataset in datasets:
        pools.setdefault(dataset.split("/")[0], []).append(dataset)
    for members in pools.values():
        if side is None and len(members) > 1:
            top = os.path.commonpath(members)
            code, *_ = __salt__["zfs_dr.run"](side, ["zfs", verb, "-r", tag, f"{top}@{snapshot}"], code=True)
            if not code:
                continue
        argv = ["zfs", verb, tag, *(f"{dataset}@{snapshot}" for dataset in members)]
        __salt__["zfs_dr.run_but"](side, argv, "tag already exists|no such tag")


def keep(side, target, source, snapshot, last):
    """
    Bookmark a set that has become whole at a target, and let go of what was kept for it before.

    side
        (dict or None) The source's side, as :func:`zfs_dr_side.connect` returns it.
    target
        (dict) As :func:`zfs_dr_side.target` returns it.
    source
        (dict) What :func:`zfs_dr_side.source_listing` returned.
    snapshot
        (string) The name of the set, which is held.
    last
        (dict) What was noted at the end of the last replication: ``snapshot`` and ``guids``, or nothing.

    Raises ``CommandExecutionError`` when ZFS refuses; the next replication does what is left.

    CLI Example: none; :func:`zfs_dr.replicate` ends with it.
    """
    _bookmark(side, target, source, snapshot)
    held = {}
    # Others' holds stay: they have other tags.
    for name, entry in source.items():
        for each in entry["snapshots"]:
            if each["held"] and each["name"] != snapshot:
                held.setdefault(each["name"], []).append(name)
    for name, datasets in held.items():
        hold(side, target, datasets, name, "release")
    before = last.get("guids") or {}
    give_up(side, target, listed_still(side, before.keys() - source.keys()), last.get("snapshot"))
    if side is None and before != {name: entry["guid"] for name, entry in source.items()}:
        # A rollback sets a source's state aside with the set before, and its hold; nobody needs that any more.
        release_asides(list(source), _tag(target))


def _bookmark(side, target, source, snapshot):
    prefix = f"zfs_dr-{target['mark']}-"
    pools, old = {}, []
    for name, entry in source.items():
        guid = next(each for each in entry["snapshots"] if each["name"] == snapshot)["guid"]
        # Another target's name may begin with this one's.
        ours = [mark for mark in entry["bookmarks"] if mark["name"].startswith(f"{prefix}ksnap-")]
        if all(mark["guid"] != guid for mark in ours):
            pools.setdefault(name.split("/")[0], []).extend([f"{name}@{snapshot}", f"{name}#{prefix}{snapshot}"])
            old += [f"{name}#{mark['name']}" for mark in ours[: 1 - MARKS or None]] if len(ours) >= MARKS else []
    for pool, pairs in pools.items():
        if side is None:
            __salt__["ksnap.command"](["zfs", "program", pool, "-", *pairs], stdin=BOOKMARK)
        else:
            made = [["zfs", "bookmark", *pairs[at : at + 2]] for at in range(0, len(pairs), 2)]
            __salt__["zfs_dr.run_all"](side, made, target["parallel"])
    __salt__["zfs_dr.run_all"](side, [["zfs", "destroy", mark] for mark in old], target["parallel"])


def listed_still(side, datasets):
    """
    List datasets of a source of which some may be gone.

    side
        (dict or None) The source's side, as :func:`zfs_dr_side.connect` returns it.
    datasets
        (iterable of strings) Their names.

    Returns what :func:`zfs_dr_side.source_listing` returns, without those that do not exist or that the other machine
    does not show any more.

    Raises ``CommandExecutionError`` when the listing fails otherwise.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.listed_still null '[tank/web]'
    """
    found = {}
    for dataset in sorted(datasets):
        try:
            found.update(__salt__["zfs_dr.source_listing"](side, [dataset]))
        except CommandExecutionError as error:
            if not re.search("does not exist|not permitted by the gate", str(error)):
                raise
    return found


def give_up(side, target, source, snapshot=None, test=False):
    """
    Release what datasets hold for a target, and destroy its bookmarks.

    side
        (dict or None) The source's side, as :func:`zfs_dr_side.connect` returns it.
    target
        (dict) As :func:`zfs_dr_side.target` returns it.
    source
        (dict) What :func:`zfs_dr_side.source_listing` returned.
    snapshot
        (string) The name of a set: nothing newer is given up, since the dataset may have moved to another stack.
        Default: all is.
    test
        (bool) Release nothing, only tell. Default: False.

    Returns a dict of two lists of names: ``released`` (snapshots) and ``bookmarks``.

    Raises ``CommandExecutionError`` when ZFS refuses.

    CLI Example: none; :func:`zfs_dr.forget` and :func:`zfs_dr.replicate` call it.
    """
    tag, prefix = _tag(target), f"zfs_dr-{target['mark']}-"
    held, bookmarks = [], []
    for dataset, entry in source.items():
        known = (snapshot, f"{prefix}{snapshot}")
        end = max((m["createtxg"] for m in entry["snapshots"] + entry["bookmarks"] if m["name"] in known), default=None)
        within = lambda mark, end=end: end is None or mark["createtxg"] <= end  # noqa: E731
        held += [f"{dataset}@{each['name']}" for each in entry["snapshots"] if each["held"] and within(each)]
        ours = (mark for mark in entry["bookmarks"] if mark["name"].startswith(f"{prefix}ksnap-") and within(mark))
        bookmarks += [f"{dataset}#{mark['name']}" for mark in ours]
    lines = __salt__["zfs_dr.run"](side, ["zfs", "holds", "-H", *held]).splitlines() if held else []
    released = [name for name, its, *_ in (line.split("\t") for line in lines) if its == tag]
    if not test:
        if released:
            __salt__["zfs_dr.run"](side, ["zfs", "release", tag, *released])
        __salt__["zfs_dr.run_all"](side, [["zfs", "destroy", mark] for mark in bookmarks], target["parallel"])
    return {"released": released, "bookmarks": bookmarks}


def release_asides(datasets, tag, test=False):
    """
    Release what is held for a target in states of this machine that :func:`ksnap.rollback` has set aside: a hold stays
    with its snapshot, and so goes aside with it, where no replication looks for it.

    datasets
        (list of strings) Whose states.
    tag
        (string) The hold's: ``zfs_dr:<target>``.
    test
        (bool) Release nothing, only tell. Default: False.

    Returns a list of the snapshots that were held.

    Raises ``CommandExecutionError`` when ZFS refuses.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.release_asides '[tank/web]' zfs_dr:vault
    """
    names = [name for each in __salt__["ksnap.aside"]() for of, name in each["datasets"].items() if of in datasets]
    if not names:
        return []
    held = [snapshot for snapshot, its in __salt__["zfs_dr.holds"](names) if its == tag]
    if held and not test:
        __salt__["ksnap.command"](["zfs", "release", tag, *held])
    return held


def holds(datasets):
    """
    List the holds on datasets' own snapshots, on this machine.

    datasets
        (list of strings) Their names.

    Returns a list of lists of two: the snapshot and the tag.

    Raises ``CommandExecutionError`` when one does not exist.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.holds '[tank/web]'
    """
    argv = ["zfs", "list", "-Hp", "-t", "snapshot", "-d", "1", "-o", "name,userrefs", *datasets]
    held = [line.split("\t")[0] for line in __salt__["ksnap.command"](argv).splitlines() if not line.endswith("\t0")]
    lines = __salt__["ksnap.command"](["zfs", "holds", "-H", *held]).splitlines() if held else []
    return [line.split("\t")[:2] for line in lines]
