"""
Which snapshots to keep
=======================

A grid says how dense the past shall be, as in zrepl: ``1x1h(keep=all) | 24x1h | 14x1d`` keeps everything of the newest
hour, then one for each of 24 hours, then one for each of 14 days, and nothing older. The intervals count back from
the newest snapshot, not from now: while a machine is off, nothing grows old. Of each interval the oldest is kept, so
that what is kept stays kept as it wanders from one interval to the next.
"""

import re

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
INTERVAL = re.compile(r"(\d+)x(\d+)([smhdw])(?:\(keep=(all|\d+)\))?")


def __virtual__():
    return __virtualname__


def grid_parsed(grid):
    """
    Read a grid.

    grid
        (string) Intervals from the newest to the oldest, joined by ``|``, each ``<number>x<length>``, the length in
        ``s``, ``m``, ``h``, ``d`` or ``w``, and if more than one is kept of each, ``(keep=<number>)`` or
        ``(keep=all)``. This is zrepl's grid.

    Returns a list of intervals from the newest to the oldest, each a list of its length in seconds and of how many are
    kept of it (``None``: all). Raises ``SaltInvocationError`` for another text.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.grid_parsed '1x1h(keep=all) | 24x1h | 14x1d'
    """
    intervals = []
    for part in str(grid).split("|"):
        found = INTERVAL.fullmatch(re.sub(r"\s", "", part))
        if not found or not int(found[1]) or not int(found[2]) or found[4] == "0":
            raise SaltInvocationError(
                f"{part.strip()!r} is no interval of a grid; one is such as 24x1h, 14x1d or 1x1h(keep=all)"
            )
        keep = None if found[4] == "all" else int(found[4] or 1)
        intervals += [[int(found[2]) * UNITS[found[3]], keep]] * int(found[1])
        if len(intervals) > 10000:
            raise SaltInvocationError(f"The grid {grid!r} has more than 10000 intervals")
    return intervals


def grid_kept(grid, created):
    """
    Tell which snapshots a grid keeps.

    grid
        (string) The grid, see :func:`grid_parsed`.
    created
        (list of numbers) When each snapshot was taken, in seconds since 1970, in any order.

    Returns a list as long as ``created``: for each snapshot the interval that keeps it, a text such as ``0s to 1h``, or
    ``None``.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.grid_kept '2x1h' '[1764107000, 1764108000, 1764115000]'
    """
    kept = [None] * len(created)
    newest = max(created, default=0)
    start = 0
    intervals = grid_parsed(grid)
    # From the oldest, so that the oldest of an interval comes first; of one second, the later in the list is newer.
    order = sorted(range(len(created)), key=lambda index: (created[index], index))
    for length, keep in intervals:
        inside = [index for index in order if start <= newest - created[index] < start + length]
        for index in inside if keep is None else inside[:keep]:
            kept[index] = f"{_duration(start)} to {_duration(start + length)}"
        start += length
    return kept


def _duration(seconds):
    for unit in ("w", "d", "h", "m"):
        if seconds and seconds % UNITS[unit] == 0:
            return f"{seconds // UNITS[unit]}{unit}"
    return f"{seconds}s"


def prune_choice(snapshots, grid=None, count=None):
    """
    Choose by age and number which snapshots go.

    snapshots
        (list) Snapshots as ``ksnap.list`` gives them, the oldest first.
    grid
        (string) See :func:`grid_parsed`. Default: none
    count
        (integer) How many of the newest are kept in any case; without a grid: the only ones. Default: none

    Returns a list of dicts in the same order: ``snapshot``, ``action`` (``keep`` or ``destroy``) and ``reasons`` (a
    list of texts). The newest one, and what is held, cloned or needed by replication, is never destroyed. A snapshot
    that is not whole pushes out none that is: what would be kept if there were only whole ones is kept.

    Raises ``SaltInvocationError`` when neither is given, and for a wrong one.

    CLI Example: none; ``ksnap.prune`` with ``test=True`` shows it.
    """
    if grid is None and count is None:
        raise SaltInvocationError("Say what to keep: a grid, or a count, or both")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise SaltInvocationError(f"count must be a number of snapshots, at least 1, not {count!r}")
    wanted = _wanted(snapshots, grid, count)
    if not all(map(_is_whole, snapshots)):
        # After a power cut the newest may be on one pool only, and must not push out the last that is on all.
        again = iter(_wanted(list(filter(_is_whole, snapshots)), grid, count))
        for each, reasons in zip(snapshots, wanted, strict=True):
            if _is_whole(each):
                reasons += [f"{why}, of those that are whole" for why in next(again) if not reasons]
    chosen = []
    for each, reasons in zip(snapshots, wanted, strict=True):
        reasons += [f"it is {why}" for why in __salt__["ksnap.kept_by"](each)]
        action = "keep" if reasons else "destroy"
        if not reasons:
            reasons = (["no interval of the grid keeps it"] if grid is not None else []) + (
                [f"it is older than the {count} newest"] if count is not None else []
            )
        chosen.append({"snapshot": each["snapshot"], "action": action, "reasons": reasons})
    return chosen


def _wanted(snapshots, grid, count):
    """For each snapshot the reasons of age and number to keep it."""
    intervals = grid_kept(grid, [each["created"] for each in snapshots]) if grid is not None else []
    found = []
    for index in range(len(snapshots)):
        rank, reasons = len(snapshots) - index, []
        if rank <= (count or 1):
            reasons.append("it is the newest" if rank == 1 else f"it is one of the {count} newest")
        if intervals and intervals[index]:
            reasons.append(f"it is the one for the age of {intervals[index]}")
        found.append(reasons)
    return found


def _is_whole(snapshot):
    return snapshot.get("whole", True)


def prune(stack, grid=None, count=None, free=None, test=False):
    """
    Destroy the snapshots of a stack that are no longer wanted.

    Only such as ``ksnap.snapshot`` made of this very stack, never one that is held, cloned or needed by replication,
    and never the newest.

    stack
        (string or dict) The stack.
    grid
        (string) How dense the past shall be, such as ``1x1h(keep=all) | 24x1h | 14x1d``, see :func:`grid_parsed`.
        Default: none
    count
        (integer) How many of the newest are kept in any case; without a grid: the only ones. Default: none
    free
        (string or integer) How much of each pool shall be free, in per cent (``10%``) or bytes (``20G``). Where less
        is, the oldest of those kept go too, as many as it takes, but not the ``count`` newest. Default: none
    test
        (bool) Only give the reasons, snapshot by snapshot. Default: False

    Returns a list of dicts, the oldest first: ``snapshot``, ``action`` (``keep`` or ``destroy``) and ``reasons``.

    Raises ``SaltInvocationError`` for wrong arguments, ``CommandExecutionError`` when a snapshot cannot be destroyed.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.prune mail '1x1h(keep=all) | 24x1h | 14x1d' count=3 free=10% test=True
    """
    if free is not None:
        _wanted_free(free, 100)
    with __salt__["ksnap.locked"](test=test):
        found = __salt__["ksnap.stack"](stack)
        mine = [
            each
            for each in __salt__["ksnap.list"](stack)
            # Two stacks may share a dataset; and a name alone is no proof of who made it.
            if each["stack"] == found["name"] and each["own"]
        ]
        if free is not None and grid is None and count is None:
            count = 1
            chosen = [{"snapshot": each["snapshot"], "action": "keep", "reasons": ["space is free"]} for each in mine]
            for each, by_count in zip(chosen, prune_choice(mine, count=1), strict=True):
                if by_count["action"] == "keep":
                    each["reasons"] = by_count["reasons"]
        else:
            chosen = prune_choice(mine, grid, count)
        if free is not None:
            _free_more(found["pools"], mine, chosen, free, count or 1)
        if not test:
            gone = {each["snapshot"] for each in chosen if each["action"] == "destroy"}
            for dataset in found["datasets"]:
                names = [each["snapshot"] for each in mine if each["snapshot"] in gone and dataset in each["datasets"]]
                for start in range(0, len(names), 100):
                    _zfs("destroy", f"{dataset}@{','.join(names[start : start + 100])}")
        return chosen


def _wanted_free(free, size):
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?)(?:iB|B)?", str(free).strip())
    if not found or (found[2] == "%" and float(found[1]) >= 100):
        raise SaltInvocationError(f"free is per cent, such as 10%, or bytes, such as 20G, not {free!r}")
    return size * float(found[1]) / 100 if found[2] == "%" else float(found[1]) * SIZES[found[2]]


def _free_more(pools, mine, chosen, free, count):
    whole = list(filter(_is_whole, mine))
    protected = {each["snapshot"] for some in (mine, whole) for each in some[max(len(some) - count, 0) :]}
    for pool, datasets in pools.items():
        size, has = map(int, _zpool("list", "-H", "-p", "-o", "size,free", pool).split())
        wanted = _wanted_free(free, size)
        going = {each["snapshot"] for each in chosen if each["action"] == "destroy"}
        for each, choice in zip(mine, chosen, strict=True):
            if has + _reclaimed(datasets, mine, going) >= wanted:
                break
            if choice["action"] == "keep" and each["snapshot"] not in protected and not __salt__["ksnap.kept_by"](each):
                going.add(each["snapshot"])
                choice["action"] = "destroy"
                choice["reasons"] = [f"of the pool {pool} less than {free} is free, and it is the oldest that may go"]
        short = wanted - has - _reclaimed(datasets, mine, going)
        if short > 0 and chosen:
            chosen[-1]["reasons"].append(f"even so, {int(short)} bytes too few of the pool {pool} will be free")


def _reclaimed(datasets, mine, going):
    total = 0
    for dataset in datasets:
        names = [each["snapshot"] for each in mine if each["snapshot"] in going and dataset in each["datasets"]]
        if names:
            shown = _zfs("destroy", "-n", "-v", "-p", f"{dataset}@{','.join(names)}")
            total += sum(int(line.split("\t")[1]) for line in shown.splitlines() if line.startswith("reclaim"))
    return total


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _zpool(*words):
    try:
        return __salt__["ksnap.command"](["zpool", *words])
    except CommandExecutionError as error:
        raise CommandExecutionError(f"How much of the pool is free cannot be told: {error}") from error
