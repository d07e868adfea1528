"""
A machine's datasets elsewhere: both sides of it
================================================

In test mode, every state says what it would do, having looked, and touches nothing.
"""

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

AHEAD = 300  # seconds that another machine's clock may be ahead


def __virtual__():
    return __virtualname__


def _result(name, result=True, comment="", changes=None):
    return {"name": name, "result": result, "comment": comment, "changes": changes or {}}


def _user(user):
    seen = __salt__["user.info"](user)
    wanted = __salt__["zfs_dr.home"](user)
    if not seen:
        return {"old": None, "new": wanted}
    return None if seen["home"] == wanted else {"old": seen["home"], "new": wanted}


def _properties(name):
    argv = ["zfs", "get", "-Hp", "-o", "property,value", "readonly,canmount,mountpoint", name]
    wanted = {"readonly": "on", "canmount": "noauto", "mountpoint": "none"}
    code, output, _ = __salt__["zfs_dr.run"](None, argv, code=True)
    if code:
        return {key: {"old": None, "new": value} for key, value in wanted.items()}, False
    has = dict(line.split("\t") for line in output.splitlines())
    return {key: {"old": has[key], "new": value} for key, value in wanted.items() if has[key] != value}, True


def target(name, user="zfs_dr", key=None):
    """
    This machine receives: there is the dataset, a user without privileges, a key that may do nothing but replicate
    into it.

    name
        (string) The dataset that the replicas become children of, such as ``backup/web1``. One for each machine that
        sends.
    user
        (string) The user. Default: ``zfs_dr``.
    key
        (string) The sender's public key, such as ``ssh-ed25519 AAAA... root@web1``. Without it, only this machine
        itself replicates into the dataset, and no user is made. Default: None.

    .. code-block:: yaml

        backup/web1:
          zfs_dr.target:
            - key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB... root@web1
    """
    grants, roles = [f"target:{name}"], ["target"]
    changes = {}
    try:
        properties, exists = _properties(name)
        if properties:
            changes["dataset"] = properties
        if key:
            changes.update(_user_changes(name, user, key, grants, roles, exists))
        if not changes:
            return _result(name, True, f"{name} is ready to receive.")
        if __opts__["test"]:
            return _result(name, None, f"{name} would be made ready to receive.", changes)
        _make(name, user, key, grants, roles, changes, exists)
        left = _properties(name)[0] or (key and _user_changes(name, user, key, grants, roles, True))
        if left:
            return _result(name, False, f"{name} is not ready to receive: {left}", changes)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, True, f"{name} was made ready to receive.", changes)


def _user_changes(name, user, key, grants, roles, exists):
    changes = {}
    if made := _user(user):
        changes["user"] = made
    if not __salt__["zfs_dr.gate_installed"]():
        changes["gate"] = "put in place"
    has = __salt__["zfs_dr.authorized"](user, key)
    if has != grants:
        changes["key"] = {"old": has, "new": grants}
    wanted = {each for role in roles for each in __salt__["zfs_dr.permissions"](role)}
    allowed = set(__salt__["zfs_dr.granted"](name).get(user, [])) if exists else set()
    if allowed != wanted:
        changes["permissions"] = {"old": sorted(allowed - wanted), "new": sorted(wanted - allowed)}
    return changes


def _make(name, user, key, grants, roles, changes, exists):
    if not exists:
        options = ["-o", "readonly=on", "-o", "canmount=noauto", "-o", "mountpoint=none"]
        __salt__["zfs_dr.run"](None, ["zfs", "create", "-p", *options, name])
    elif "dataset" in changes:
        pairs = [f"{key_}={each['new']}" for key_, each in changes["dataset"].items()]
        __salt__["zfs_dr.run"](None, ["zfs", "set", *pairs, name])
    if not key:
        return
    if "gate" in changes:
        __salt__["zfs_dr.gate_install"]()
    __salt__["zfs_dr.user_present"](user)
    if "key" in changes:
        __salt__["zfs_dr.authorize"](user, key, grants)
    if "permissions" in changes:
        if changes["permissions"]["old"]:
            __salt__["zfs_dr.revoke"](user, name, permissions=changes["permissions"]["old"])
        for role in roles:
            __salt__["zfs_dr.grant"](user, name, role)


def replicated(name, stack, target, take=True, age=86400, full=False, schedule=None, grid=None, count=None):
    """
    A whole set of a stack is at the target, and it is not older than is allowed; a systemd timer sees to the next ones.

    name
        (string) A name for this state.
    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it. Where it is on this machine, its ``grid`` is what the
        timer keeps there; on another machine that is the state ``zfs_dr.pruned``.
    take
        (bool) Whether a snapshot is taken for it. Default: True. A stack that is pulled has its snapshots taken
        elsewhere: say False.
    age
        (int) Seconds that the newest whole set may be old. Default: 86400, a day.
    full
        (bool) As :func:`zfs_dr.replicate` takes it. Default: False.
    schedule
        (string) When the timer replicates, as systemd.time(7) has it: ``hourly``, ``*:0/15``. Default: no timer
    grid, count
        What the timer keeps of the stack's own snapshots, as ``ksnap.prune`` takes them. Default: everything

    .. code-block:: yaml

        web is in the vault:
          zfs_dr.replicated:
            - stack: web
            - target: vault
            - age: 7200
            - schedule: hourly
            - grid: 24x1h | 14x1d
    """
    changes = {}
    try:
        units = _timer(stack, target, schedule, [take, grid, count], test=True)
        if units:
            changes["timer"] = units
        seen = __salt__["zfs_dr.status"](stack, target)
        if not seen["reachable"]:
            return _result(name, False, seen["reason"])
        # One from the future says nothing of its age: a clock is wrong, or was.
        new = bool(seen["snapshot"]) and -AHEAD <= seen["age"] <= age
        comment = "A replication is at work."
        if not seen["running"]:
            comment = f"{seen['snapshot']}, {seen['age']:.0f} s old" if seen["snapshot"] else "no whole set"
            comment = f"At the target is {comment}."
        if __opts__["test"]:
            if not (new or seen["running"]):
                changes["snapshot"] = {"old": seen["snapshot"], "new": "a newer one"}
            return _result(name, None if changes else True, comment, changes)
        if not (new or seen["running"]):
            done = __salt__["zfs_dr.replicate"](stack, target, take=take, full=full)
            changes["snapshot"] = {"old": seen["snapshot"], "new": done["snapshot"]}
            changes["bytes"] = done["bytes"]
            comment = f"{done['snapshot']} is whole at the target, {done['age']:.0f} s old."
            if done["age"] > age:
                return _result(name, False, f"{comment} There was nothing newer.", changes if done["changed"] else {})
        if units:
            _timer(stack, target, schedule, [take, grid, count], test=False)
            left = _timer(stack, target, schedule, [take, grid, count], test=True)
            if left:
                return _result(name, False, f"The timer is not as it shall be: {left}", changes)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error), changes if "snapshot" in changes else {})
    return _result(name, True, comment, changes)


def _timer(stack, target, calendar, options, test):
    if calendar:
        return __salt__["zfs_dr.schedule"](calendar, stack, target, *options, test=test)
    return {unit: {"old": "there", "new": None} for unit in __salt__["zfs_dr.unschedule"](stack, target, test=test)}


def pruned(name, stack, grid=None, count=None):
    """
    At a target on this machine there is no set of a stack but those that are to be kept.

    name
        (string) The dataset that the replicas are children of.
    stack
        (string) The stack's name.
    grid, count
        As :func:`zfs_dr_target.prune` takes them.

    .. code-block:: yaml

        backup/web1:
          zfs_dr.pruned:
            - stack: web
            - grid: 24x1h | 30x1d
    """
    try:
        doomed = __salt__["zfs_dr.prune"](name, stack, grid, count, test=True)["destroyed"]
        if not doomed:
            return _result(name, True, f"All sets of {stack} in {name} are to be kept.")
        if __opts__["test"]:
            return _result(name, None, f"Sets of {stack} would be destroyed.", {"destroyed": doomed})
        gone = __salt__["zfs_dr.prune"](name, stack, grid, count)["destroyed"]
        left = __salt__["zfs_dr.prune"](name, stack, grid, count, test=True)["destroyed"]
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, not left, f"Of {stack}, {len(gone)} sets were destroyed.", {"destroyed": gone})


def absent(name, stack, target):
    """
    A stack is not replicated to a target any more: no timer does it, nothing is held for it. What is at the target
    stays.

    name
        (string) A name for this state.
    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it.

    .. code-block:: yaml

        no more to the old vault:
          zfs_dr.absent:
            - stack: web
            - target: old
    """
    try:
        kept = _kept(stack, target)
        if not kept:
            return _result(name, True, "Nothing is held for this target, and no timer replicates to it.")
        if __opts__["test"]:
            return _result(name, None, "What is held for this target would be released.", kept)
        __salt__["zfs_dr.unschedule"](stack, target)
        told = __salt__["zfs_dr.forget"](stack, target)
        left = _kept(stack, target)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    if left:
        return _result(name, False, f"Something is held for this target yet: {left}", kept)
    there = f" The target could not be reached: {told['unreachable']}" if told["unreachable"] else ""
    return _result(name, True, f"What was held for this target is released.{there}", kept)


def _kept(stack, target):
    held = __salt__["zfs_dr.forget"](stack, target, test=True)
    kept = {key: held[key] for key in ("released", "bookmarks") if held[key]}
    units = __salt__["zfs_dr.unschedule"](stack, target, test=True)
    return {**kept, "timer": units} if units else kept
