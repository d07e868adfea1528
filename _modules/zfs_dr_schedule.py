"""
Replication by the clock
========================

A systemd timer for each stack and target; see ``ksnap.timer_present`` for why it is one.
"""

import json

from salt.exceptions import SaltInvocationError

__virtualname__ = "zfs_dr"


def __virtual__():
    return __virtualname__


def periodic(stack, target, take=True, grid=None, count=None):
    """
    Replicate, then prune: what the timer of :func:`schedule` runs.

    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it. Where it is on this machine and has a ``grid``, it is
        pruned by that; another machine prunes itself.
    take
        (bool) As :func:`zfs_dr.replicate` takes it. Default: True.
    grid, count
        What to keep of the stack's own snapshots, see ``ksnap.prune``. Default: everything

    Returns a dict: ``snapshot`` (the set that is whole at the target now), ``bytes`` (moved), ``destroyed`` (a list of
    the stack's sets that went here) and ``destroyed_there`` (of those that went at the target).

    Raises as :func:`zfs_dr.replicate` does.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.periodic web vault grid='24x1h | 14x1d'
    """
    target = __salt__["zfs_dr.target"](target)
    done = __salt__["zfs_dr.replicate"](stack, target, take=take)
    told = {"snapshot": done["snapshot"], "bytes": done["bytes"], "destroyed": [], "destroyed_there": []}
    if grid is not None or count is not None:
        chosen = __salt__["ksnap.prune"](stack, grid, count)
        told["destroyed"] = [each["snapshot"] for each in chosen if each["action"] == "destroy"]
    if target["grid"]:
        name, *_ = __salt__["zfs_dr.members"](stack, target)
        gone = __salt__["zfs_dr.prune"](target["dataset"], name, target["grid"])
        told["destroyed_there"] = list(gone["destroyed"])
    return told


def _refuse(target, take, grid, count):
    if target["grid"]:
        __salt__["ksnap.grid_parsed"](target["grid"])
        if target["ssh"] and target["direction"] == "push":
            raise SaltInvocationError(
                "A target on another machine is pruned there (zfs_dr.pruned): a source that may destroy its replicas "
                "is no safety. Leave its grid out here."
            )
    if grid is not None:
        __salt__["ksnap.grid_parsed"](grid)
    if target["direction"] == "pull" and (take or grid is not None or count is not None):
        raise SaltInvocationError(
            "The snapshots of a stack that is pulled are taken and pruned on its own machine: say take=False, and no "
            "grid and count"
        )


def schedule(calendar, stack, target, take=True, grid=None, count=None, test=False):
    """
    Let a systemd timer replicate a stack, and prune.

    calendar
        (string) When, as systemd.time(7) has it: ``hourly``, ``*:0/15``, ``03:30``.
    stack, target, take, grid, count
        As :func:`periodic` takes them. Names are looked up now, and what they stand for is written into the unit: the
        timer asks no master.
    test
        (bool) Only say what would change. Default: False

    Returns a dict of each unit that changed to a dict of ``old`` and ``new`` text. The units are
    ``zfs_dr-<target>-<stack>.service`` and ``.timer``; the timer is enabled and started.

    Raises ``SaltInvocationError`` for wrong arguments, ``CommandExecutionError`` when systemd does not take the timer.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.schedule hourly web vault grid='24x1h | 14x1d'
    """
    target = __salt__["zfs_dr.target"](target)
    stack_name, datasets, _ = __salt__["zfs_dr.members"](stack, target)
    _refuse(target, take, grid, count)
    declared = __salt__["config.get"]("ksnap:stacks")[stack] if isinstance(stack, str) else stack
    if target["direction"] == "pull":
        declared = {"datasets": datasets}
    arguments = {"take": take, "grid": grid, "count": count}
    command = __salt__["ksnap.salt_call"](
        "zfs_dr.periodic",
        *(json.dumps(each, sort_keys=True) for each in ({"name": stack_name, **declared}, target)),
        *(f"{key}={value}" for key, value in arguments.items() if value is not None),
    )
    about = f"Replication of the stack {stack_name} to {target['id']} (zfs_dr)"
    return __salt__["ksnap.timer_present"](
        _units(stack_name, target), calendar, about, command, after="network-online.target", test=test
    )


def unschedule(stack, target, test=False):
    """
    Take back what :func:`schedule` did. Snapshots and replicas stay.

    stack, target
        As :func:`schedule` took them.
    test
        (bool) Only say what would change. Default: False

    Returns a list of the units that were removed.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.unschedule web vault
    """
    target = __salt__["zfs_dr.target"](target)
    return __salt__["ksnap.timer_absent"](_units(__salt__["zfs_dr.members"](stack, target)[0], target), test=test)


def _units(stack, target):
    return f"zfs_dr-{target['id']}-{stack}"
