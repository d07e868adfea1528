"""
Snapshots by the clock
======================

A systemd timer for each stack, which takes a snapshot and prunes; see ``ksnap.timer_present`` for why it is one.
"""

import json
import re

from salt.exceptions import SaltInvocationError

__virtualname__ = "ksnap"

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


def __virtual__():
    return __virtualname__


def periodic(stack, label="periodic", grid=None, count=None, free=None):
    """
    Take a snapshot, then prune: what the timer of :func:`schedule` runs.

    stack
        (string or dict) The stack.
    label
        (string) The snapshot's label. Default: periodic
    grid, count, free
        What to keep, see ``ksnap.prune``. Default: everything

    Returns a dict: ``snapshot`` (its name) and ``destroyed`` (a list of names).

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.periodic mail grid='24x1h | 14x1d'
    """
    taken = __salt__["ksnap.snapshot"](stack, label=label, reason="by the clock")["snapshot"]
    destroyed = []
    if grid is not None or count is not None or free is not None:
        chosen = __salt__["ksnap.prune"](stack, grid, count, free)
        destroyed = [each["snapshot"] for each in chosen if each["action"] == "destroy"]
    return {"snapshot": taken, "destroyed": destroyed}


def schedule(name, calendar, stack=None, label="periodic", grid=None, count=None, free=None, test=False):
    """
    Let a systemd timer take snapshots of a stack, and prune them.

    name
        (string) What to call it, and the stack if none is given. The units are ``ksnap-<name>.service`` and ``.timer``.
    calendar
        (string) When, as systemd.time(7) has it: ``hourly``, ``*:0/15``, ``03:30``.
    stack
        (string or dict) The stack. A name must be in the minion's own configuration: the timer asks no master.
        Default: the stack of the name ``name``
    label, grid, count, free
        See :func:`periodic`.
    test
        (bool) Only say what would change. Default: False

    Returns a dict of each unit that changed to a dict of ``old`` and ``new`` text; the timer is enabled and started in
    any case.

    Raises ``SaltInvocationError`` for wrong arguments, ``CommandExecutionError`` when systemd does not take the timer.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.schedule mail hourly grid='24x1h | 14x1d'
    """
    units = _units(name)
    if grid is not None:
        __salt__["ksnap.grid_parsed"](grid)
    wanted = stack or name
    __salt__["ksnap.stack"](wanted)
    arguments = {"label": label, "grid": grid, "count": count, "free": free}
    command = __salt__["ksnap.salt_call"](
        "ksnap.periodic",
        wanted if isinstance(wanted, str) else json.dumps(wanted),
        *(f"{key}={value}" for key, value in arguments.items() if value is not None),
    )
    about = f"Snapshots of the stack {name}, and pruning (ksnap)"
    return __salt__["ksnap.timer_present"](units, calendar, about, command, test=test)


def unschedule(name, test=False):
    """
    Take back what :func:`schedule` did. Snapshots stay.

    name
        (string) Its name.
    test
        (bool) Only say what would change. Default: False

    Returns a list of the units that were removed.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.unschedule mail
    """
    return __salt__["ksnap.timer_absent"](_units(name), test=test)


def _units(name):
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SaltInvocationError(f"name must be of letters, digits, and _.:-, not {name!r}")
    if name == "recover":
        raise SaltInvocationError("ksnap-recover.service is what ksnap.boot_unit makes: call this one something else")
    return f"ksnap-{name}"
